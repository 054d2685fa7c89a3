#!/usr/bin/env bash
# Waits for the service at ADDRESS, then asks it what a client would; fails where an answer is missing. Prints Markdown.
# Usage: ask.sh ADDRESS
set -euo pipefail

address=$1
call() { curl --silent --show-error --fail --max-time 120 "$@"; }

call --retry 150 --retry-delay 2 --retry-all-errors --output /dev/null "$address/readyz"
question='{"model": "llm-from-scratch", "max_tokens": 16, "messages": [{"role": "user", "content": "What is a stick insect?"}]}'
echo '# The Bento answers'
for path in /v1/models /metrics; do
    call --output /dev/null "$address$path"
    echo "* \`GET $path\`: ok"
done
answer=$(call "$address/v1/chat/completions" --header 'content-type: application/json' --data "$question")
python3 - "$answer" << 'END'
import json
import sys

said = json.loads(sys.argv[1])
assert said["choices"][0]["message"]["role"] == "assistant", said
print(f"* `POST /v1/chat/completions`: {said['usage']['completion_tokens']} tokens, {said['choices'][0]['finish_reason']}")
END
