"""The lessons run as a learner runs them, at toy size and without a network, and what they show is true."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.tiny import tiny_embedder, tiny_model

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
WEEKS = (1, 2, 3, 4, 5, 6, 8, 9, 10, 11)
MAY_IMPORT = {"copy", "importlib", "llm_from_scratch", "matplotlib", "numpy", "pathlib", "requests", "tempfile", "torch"}
LONGEST_FUNCTION = 5  # lines: a lesson calls and draws, and the package computes

TOY: dict[int, dict[str, Any]] = {
    1: {"STEPS": 60, "ORDERS": 3, "SHOWN": 10},
    2: {"STEPS": 20, "WINDOWS": [1, 2]},
    3: {"STEPS": 10, "LAYERS": 2, "HEADS": 2, "WIDTH": 16, "CONTEXT": 48, "CHOSEN": [(0, 0), (1, 1)]},
    4: {"STEPS": 20, "LAYERS": 2, "HEADS": 2, "WIDTH": 16, "CONTEXT": 32, "TEMPERATURES": [0.2, 1.5]},
    5: {"SIZES": [261, 280, 320], "SHOWN_MERGES": 10, "TEXTS": 4_000},
    6: {"STEPS": 40, "VOCABULARY": 300, "LAYERS": 2, "WIDTH": 32, "CONTEXT": 32, "DEPTHS": [1, 2, 3], "TIMED": 3, "EVALUATED": 500},
    8: {"STEPS": 40, "LAYERS": 1, "WIDTH": 32, "CONTEXT": 32, "BITS": [8, 4, 2], "EVALUATED": 1_000},
    9: {"STEPS": 40, "LAYERS": 1, "WIDTH": 32, "CONTEXT": 32, "RANKS": [1, 4], "EVALUATED": 500},
    10: {"STEPS": 40, "LAYERS": 1, "WIDTH": 32, "PROMPTS": 160, "ASKED": 16, "TAUGHT": 150, "MOVED": 24, "PRICES": [0.5, 0.0]},
    11: {"TEXT_FOLDER": ""},
}

POEM = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:

Sometime too hot the eye of heaven shines,
And often is his gold complexion dimmed,
And every fair from fair sometime declines,
By chance, or nature's changing course untrimmed:

But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st,
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st,

So long as men can breathe, or eyes can see,
So long lives this, and this gives life to thee.

"""

Shown = Callable[[int], str]


def read(week: int) -> Any:
    return nbformat.read(NOTEBOOKS / f"week_{week:02}.ipynb", as_version=4)


def parameters(notebook: Any) -> Any:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def parsed(cell: Any) -> ast.Module:
    """A code cell without its magics."""
    return ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", cell.source, flags=re.MULTILINE))


def code_cells(week: int) -> list[Any]:
    return [cell for cell in read(week).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Any]]:
    """Each notebook executed once, at toy size, in an empty folder, by this interpreter."""
    home, texts = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("texts")
    (texts / "poem.txt").write_text(POEM * 12, encoding="utf-8")
    bundles = {"EMBEDDER": str(tiny_embedder(texts.parent / "embedder")), "MODEL": str(tiny_model(texts.parent / "model", context=256))}

    @cache
    def run(week: int) -> Any:
        notebook = read(week)
        turned = {"TEXT_FOLDER": str(texts), **TOY[week], **(bundles if week == 11 else {})}
        cell = parameters(notebook)
        known = {target.id for node in parsed(cell).body for target in ast.walk(node) if isinstance(target, ast.Name)}
        assert turned.keys() <= known
        cell.source += "\nimport sys\nprint(sys.executable)\n" + "\n".join(f"{name} = {value!r}" for name, value in turned.items())
        # Without kernel folders only the built-in kernel is left, which is this interpreter, whatever a person has installed.
        kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        work = tmp_path_factory.mktemp(f"week_{week}")
        NotebookClient(notebook, km=kernel, timeout=120, resources={"metadata": {"path": str(work)}}).execute(cleanup_kc=True)
        assert list(work.iterdir()) == [], "a lesson leaves no files when it is given its text"
        return notebook

    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        yield run


@pytest.fixture
def shown(ran: Callable[[int], Any]) -> Shown:
    """All that a notebook printed."""
    return lambda week: "".join(
        output.get("text", "") for cell in ran(week).cells for output in cell.get("outputs", []) if output.get("name") == "stdout"
    )


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def number_after(words: str, text: str) -> float:
    found = re.search(re.escape(words) + r"\s*(\d[\d.e+-]*)", text)
    assert found, f"{words!r} is not in what was shown"
    return float(found[1])


@pytest.mark.parametrize("week", WEEKS)
def test_a_notebook_is_valid_and_stored_without_what_it_showed(week: int) -> None:
    notebook = read(week)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell.id for cell in notebook.cells] == [f"week-{week}-{place:02}" for place in range(len(notebook.cells))]
    for cell in code_cells(week):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("week", WEEKS)
def test_a_notebook_says_what_the_idea_is_what_it_cannot_do_and_what_to_try(week: int) -> None:
    notebook = read(week)
    opening, closing = notebook.cells[0].source, notebook.cells[-1].source
    assert opening.startswith(f"# Week {week}. ")
    assert "**The idea.**" in opening
    assert "**What it cannot do.**" in opening
    assert closing.startswith("## Try")


@pytest.mark.parametrize("week", WEEKS)
def test_a_notebook_opens_with_the_cell_that_colab_needs(week: int) -> None:
    first = code_cells(week)[0].source
    assert 'find_spec("llm_from_scratch") is None' in first
    assert "REPOSITORY = " in first
    assert "git+{REPOSITORY}" in first


@pytest.mark.parametrize("week", WEEKS)
def test_a_notebook_holds_no_logic_of_its_own(week: int) -> None:
    for cell in code_cells(week):
        for node in ast.walk(parsed(cell)):
            assert not isinstance(node, ast.ClassDef)
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or node.lineno) - node.lineno < LONGEST_FUNCTION, f"{node.name} belongs in the package"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert {name.split(".")[0] for name in names} <= MAY_IMPORT


def test_the_kernel_is_the_interpreter_that_runs_the_tests(shown: Shown) -> None:
    assert shown(1).splitlines()[0] == sys.executable


def test_week_1_learns_the_table_that_it_counted_and_its_probabilities_sum_to_one(ran: Callable[[int], Any], shown: Shown) -> None:
    assert number_after("over 3 orders and 400 contexts:", shown(1)) < 1e-9
    assert number_after("at the end", shown(1)) < number_after("loss at the start", shown(1))
    assert all(f"--- {name}" in shown(1) for name in ("untrained", "bigram", "n-gram of order 3"))
    assert pictures(ran(1)) == 3


def test_week_2_shows_that_an_mlp_sees_its_window_and_nothing_before(ran: Callable[[int], Any], shown: Shown) -> None:
    moves = [number_after(f"{back} back: the logits move by", shown(2)) for back in range(1, 6)]
    assert all(move > 0 for move in moves[:3]), "the window is three"
    assert moves[3:] == [0.0, 0.0]
    assert [f"window {window}:" in shown(2) for window in (1, 2, 3, 5)] == [True, True, True, False]
    assert pictures(ran(2)) == 3


def test_week_3_proves_that_no_head_sees_the_future(ran: Callable[[int], Any], shown: Shown) -> None:
    assert number_after("weight on the future, all layers and heads:", shown(3)) == 0.0
    assert number_after("largest move of an earlier logit:", shown(3)) == 0.0
    assert number_after("smallest move of the changed character's own:", shown(3)) > 0
    assert number_after("largest gradient from the future:", shown(3)) == 0.0
    assert "from the past or present is above zero: True" in shown(3)
    assert number_after("without a mask, an earlier answer moves by", shown(3)) > 0
    assert "the package's head gives the same: True True" in shown(3)
    assert pictures(ran(3)) == 3


def test_week_4_takes_the_residual_stream_apart_and_back_together(ran: Callable[[int], Any], shown: Shown) -> None:
    assert "embedding + all that was added is what the model computes: True" in shown(4)
    assert number_after("bits per byte after", shown(4).replace(",", "")) == 20 * 8 * 32, "every step reads its batch"
    assert re.findall(r"--- temperature (\S+)", shown(4)) == ["0.2", "1.5"]
    assert pictures(ran(4)) == 3


def test_week_5_shortens_a_sentence_merge_by_merge_and_loses_nothing(ran: Callable[[int], Any], shown: Shown) -> None:
    counts = [number_after(f"{size}:", shown(5)) for size in (261, 280, 320)]
    assert counts[0] == len("To be, or not to be, that is the question.")
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
    assert "and back: True" in shown(5)
    assert shown(5).count("back again: True") == 4
    assert pictures(ran(5)) == 3


def test_week_6_counts_gpt_2_recomputes_the_same_gradients_and_takes_torchs_steps(ran: Callable[[int], Any], shown: Shown) -> None:
    said = shown(6).replace(",", "")
    assert number_after("by hand", said) == number_after("the model", said) == 124_439_808
    whole, checkpointed = (number_after(name, said) for name in ("all is kept:", "checkpointing:"))
    assert checkpointed == number_after("the input of a layer:", said), "and nothing else"
    assert whole > 10 * checkpointed
    assert number_after("largest difference of a gradient:", said) == 0.0
    assert number_after("largest difference from torch's after 50 steps:", said) < 1e-5
    steps = [float(step) for step in re.findall(r"gradients of about .*: a step of (\S+)", said)]
    assert max(steps) < 2 * min(steps), "over gradients of five orders of magnitude"
    assert number_after("decays:", said) + number_after("does not:", said) == number_after("all:", said)
    assert "the same losses: True" in said
    assert pictures(ran(6)) == 3


def test_week_8_moves_no_weight_by_more_than_half_a_step_and_shows_what_an_outlier_does(ran: Callable[[int], Any], shown: Shown) -> None:
    assert number_after("no weight moved by more than", shown(8)) < 0.57, "half a step, and float16's own rounding"
    kl = [number_after(f"{bits} bits: KL", shown(8)) for bits in (8, 4, 2)]
    assert kl == sorted(kl)
    of_row, of_matrix = re.findall(r"outliers, 8 bits: KL (\S+) with a scale a row, (\S+) with", shown(8))[0]
    assert float(of_row) < float(of_matrix)
    assert number_after("bf16:", shown(8)) == 0.5
    assert 0.25 < number_after("int8_weight:", shown(8)) < 0.4
    assert pictures(ran(8)) == 2


def test_week_9_starts_as_the_base_adds_as_many_directions_as_the_rank_and_takes_them_off_again(
    ran: Callable[[int], Any], shown: Shown
) -> None:
    assert "a fresh adapter changes nothing: True" in shown(9)
    assert number_after("directions that were added:", shown(9)) == 4
    assert number_after("largest difference of merged and attached:", shown(9)) < 1e-4
    assert "the base underneath is as it was: True" in shown(9)
    before, after = re.findall(r"rank  4: .*, (\S+) -> (\S+) bits per byte", shown(9))[0]
    assert float(after) < float(before)
    assert pictures(ran(9)) == 2


def test_week_10_pays_for_distance_or_goes_far(ran: Callable[[int], Any], shown: Shown) -> None:
    assert number_after("told right of held-out pairs:", shown(10)) > 55
    assert "the start: gold" in shown(10)
    kept, let_go = (number_after("KL", shown(10).partition(f"GRPO, beta {price}: ")[2]) for price in (0.5, 0.0))
    assert kept < let_go
    assert number_after("the start: gold", shown(10)) < number_after("GRPO, beta 0.0: gold", shown(10))
    assert pictures(ran(10)) == 1


def test_week_11_finds_by_words_and_lets_no_claim_be_cited_that_is_not_there(ran: Callable[[int], Any], shown: Shown) -> None:
    """The encoder of this test is untrained, so what it finds by meaning is chance."""
    assert "'twig' is in 2 of 10" in shown(11)
    assert re.search(r"bm25: \[\('Stick insect'", shown(11))
    assert "each of length 1.0000" in shown(11)
    assert "passages of 10 documents" in shown(11)
    assert (
        "what stays: Stick insects look like twigs or leaves and keep still by day [1]. They came from the moon in silver ships."
        in shown(11)
    )
    assert "support of 'came from the moon in silver ships': 0.00" in shown(11)
    assert "answer:" in shown(11)
    assert pictures(ran(11)) == 1
