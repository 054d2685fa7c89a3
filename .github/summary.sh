#!/usr/bin/env bash
# Markdown for a job summary, in a folder where `python -m pipelines experiment smoke` has ended: the toy rebuild's report; by how much
# its numbers moved since the commit BASE, which is rebuilt for that in a clone with the same cache, so that only the nodes that differ
# run; and how the committed numbers, those of a full rebuild, differ from BASE's.
# Usage: summary.sh [BASE]
set -euo pipefail

base=${1:-}
python=$PWD/.venv/bin/python
clone=$(mktemp -d)/base
trap 'rm -rf "$(dirname "$clone")"' EXIT

folded() { # TITLE; what is read goes below it, closed until clicked
    printf '\n<details><summary>%s</summary>\n\n' "$1"
    cat
    printf '\n</details>\n'
}

rebuilt_base() { # the toy rebuild of BASE, committed in the clone; its own code, this environment's packages
    git clone --quiet --no-checkout . "$clone" && cd "$clone" && git checkout --quiet --detach "$base" \
        && "$python" -m dvc cache dir --local "$OLDPWD/.dvc/cache" \
        && PYTHONPATH=$PWD/src "$python" -m pipelines experiment smoke \
        && git -c user.name=ci -c user.email=ci@localhost commit --quiet --all --message "toy rebuild of $base"
}

echo '# Toy rebuild'
echo 'Every part at toy size: that it fits is the point, its numbers mean nothing.'
folded 'The report' < reports/report.md
if ! git cat-file -e "$base^{commit}" 2> /dev/null; then
    echo 'There is no earlier commit to compare with.'
elif (rebuilt_base) >&2; then
    cp reports/*.json "$clone/reports/" # whichever of them is BASE's metric
    (cd "$clone" && "$python" -m dvc metrics diff --md --precision 4) | folded "Toy numbers against those of ${base:0:7}"
else
    echo "${base:0:7} does not rebuild with the packages of this change, so its toy numbers are not compared; the log says why."
fi
if git cat-file -e "$base^{commit}" 2> /dev/null; then
    "$python" -m dvc metrics diff --md --precision 4 "$base" HEAD | folded "Committed numbers against those of ${base:0:7}"
fi
