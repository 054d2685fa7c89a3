"""When a challenger takes over: on numbers worked by hand, against scipy's bootstrap, and on real models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_from_scratch import tokenizer
from llm_from_scratch.data.documents import Document
from llm_from_scratch.evaluation import scores
from llm_from_scratch.evaluation.likelihood import score
from llm_from_scratch.evaluation.promotion import Rule, Scores, decide, paired_gain
from llm_from_scratch.evaluation.splits import ids_of
from llm_from_scratch.evaluation.whole import open_whole
from llm_from_scratch.finetune.sft import answer_loss, encode_records
from tests.tiny import CONTEXT, SENTENCES, tiny_model, tiny_quantized

RULE = Rule(minimum_gain=0.01, minimum_units=2, resamples=4000, confidence=0.95, seed=1)


def costing(*costs: float, weight: float = 1.0) -> Scores:
    return Scores("val_bpb", {str(place): (cost, weight) for place, cost in enumerate(costs)})


def noisy(mean: float, spread: float, seed: int) -> Mapping[str, float]:
    return {str(place): cost for place, cost in enumerate(np.random.default_rng(seed).normal(mean, spread, 200).tolist())}


def test_of_two_units_a_quarter_of_the_resamples_is_each_one_twice() -> None:
    """By hand: the gains are 0.1 and 0.3, so resamples say 0.1, 0.2, 0.2 and 0.3, each as often as the others."""
    gain = paired_gain(costing(2.0, 5.0), costing(1.9, 4.7), RULE)
    assert (gain.value, gain.low, gain.high, gain.units) == (pytest.approx(0.2), pytest.approx(0.1), pytest.approx(0.3), 2)


def test_the_interval_is_scipys() -> None:
    from scipy.stats import bootstrap

    rng = np.random.default_rng(3)
    before, weights = rng.gamma(4, 50, 150), rng.integers(50, 400, 150).astype(float)
    after = before - weights * rng.normal(0.02, 0.1, 150)
    champion, challenger = (
        Scores("val_bpb", {f"{place:03}": pair for place, pair in enumerate(zip(costs.tolist(), weights.tolist(), strict=True))})
        for costs in (before, after)
    )
    ours = paired_gain(champion, challenger, replace(RULE, resamples=20_000))

    def ratio(saved: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
        return saved.sum(axis) / weight.sum(axis)

    drawn = {"paired": True, "n_resamples": 20_000, "method": "percentile", "vectorized": True, "rng": np.random.default_rng(0)}
    theirs = bootstrap((before - after, weights), ratio, **drawn).confidence_interval
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=5e-4), pytest.approx(theirs.high, abs=5e-4))


def test_the_same_model_is_never_promoted() -> None:
    same = costing(*(2.0 + place / 10 for place in range(100)))
    decision = decide(same, same, replace(RULE, minimum_gain=0.0))
    assert not decision.promoted
    assert "inside the noise" in decision.reason


def test_a_gain_inside_the_noise_promotes_nothing_and_a_real_one_does() -> None:
    before = noisy(2.0, 0.5, seed=0)
    noise, gain = noisy(0.02, 0.4, seed=1), noisy(0.2, 0.4, seed=1)
    champion = costing(*before.values())
    luck = decide(champion, costing(*(before[unit] - noise[unit] for unit in before)), RULE)
    skill = decide(champion, costing(*(before[unit] - gain[unit] for unit in before)), RULE)
    assert (luck.promoted, skill.promoted) == (False, True)
    assert skill.reason.startswith("the gain in val_bpb is +0.1705 (95% interval +0.1201 to ")
    assert "on 200 units, all of it above 0.01" in skill.reason


def test_what_is_clearly_worse_is_called_so() -> None:
    before = noisy(2.0, 0.5, seed=0)
    decision = decide(costing(*before.values()), costing(*(cost + 0.1 for cost in before.values())), RULE)
    assert (decision.promoted, decision.reason.endswith("worse beyond the noise")) == (False, True)


def test_pairing_sees_what_the_two_means_alone_would_not() -> None:
    """Units differ by far more than the models do; a hundredth off each of them is still beyond doubt."""
    before = noisy(5.0, 3.0, seed=0)
    assert decide(costing(*before.values()), costing(*(cost - 0.02 for cost in before.values())), RULE).promoted


def test_units_weigh_what_they_hold() -> None:
    """A long document counts for its bytes: 10 bits saved on 100 bytes, and none on 300, are 0.025 bits a byte."""
    champion = Scores("val_bpb", {"short": (200.0, 100.0), "long": (600.0, 300.0)})
    challenger = Scores("val_bpb", {"short": (190.0, 100.0), "long": (600.0, 300.0)})
    assert paired_gain(champion, challenger, RULE).value == pytest.approx(0.025)
    assert champion.mean == pytest.approx(2.0)


def test_what_was_not_asked_the_same_is_not_compared() -> None:
    few = decide(costing(2.0), costing(1.0), RULE)
    assert (few.promoted, few.reason) == (False, "1 held-out units are the champion's too, and the rule wants 2")
    other = decide(costing(2.0, 2.0), replace(costing(1.0, 1.0), metric="gold_cost"), RULE)
    assert not other.promoted
    assert "nothing to compare" in other.reason


def test_scores_go_through_their_file_and_what_is_none_is_refused() -> None:
    kept = costing(2.123456, 3.0, weight=17.0)
    assert Scores.from_json(kept.to_json()).units == {"0": (2.12346, 17.0), "1": (3.0, 17.0)}
    for text in ("[]", "no", '{"metric": "val_bpb", "units": {"a": 3}}'):
        with pytest.raises(ValueError, match="no scores of held-out units"):
            Scores.from_json(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bundles") / "model")


@pytest.fixture(scope="module")
def exam() -> scores.Exam:
    documents = [
        Document(f"d{n}", f"Thing {n}", f"{SENTENCES[n % 4]} {SENTENCES[(n + 1) % 4]} {n}", "validation", "a thing", "Things")
        for n in range(12)
    ]
    return scores.Exam.of(documents, 10, {"kind": "length", "characters": 40}, 6, 1)


def test_texts_cost_together_what_the_ruler_says(model: Path, exam: scores.Exam) -> None:
    found = scores.scores_of(model, "val_bpb", exam)
    opened, words = open_whole(model)
    ruler = score(opened, ids_of(["", *exam.texts], words), words.token_bytes(), CONTEXT)
    assert len(found.units) == 10
    assert found.mean == pytest.approx(ruler.val_bpb, rel=1e-9)


def test_where_no_text_is_held_out_none_costs_anything(model: Path, exam: scores.Exam) -> None:
    """It used to be an error of numpy's."""
    assert scores.scores_of(model, "val_bpb", replace(exam, texts=[])).units == {}


def test_answers_cost_together_what_fine_tuning_minimised(model: Path, exam: scores.Exam) -> None:
    found = scores.scores_of(model, "val_loss", exam)
    opened, words = open_whole(model)
    examples = encode_records(exam.records, words, CONTEXT)
    bits = sum(cost for cost, _ in found.units.values())
    assert bits * math.log(2) / examples.answer_tokens == pytest.approx(answer_loss(opened, examples, 4), rel=1e-5)


def test_a_quantized_model_is_asked_the_same_units_as_its_original(model: Path, exam: scores.Exam, tmp_path: Path) -> None:
    small = tiny_quantized(tmp_path / "int8", model)
    plain, packed = (scores.scores_of(folder, "val_bpb", exam) for folder in (model, small))
    assert plain.units.keys() == packed.units.keys()
    assert packed.mean == pytest.approx(plain.mean, rel=0.05)


def test_gold_is_the_judges_mean_and_two_policies_draw_the_same_numbers(model: Path, exam: scores.Exam, tmp_path: Path) -> None:
    once, again = (scores.scores_of(model, "gold_cost", exam) for _ in range(2))
    assert once == again
    assert all(cost >= 0 for cost, _ in once.units.values()), "a length is judged from -1 to 0"
    other = scores.scores_of(tiny_model(tmp_path / "other", seed=1), "gold_cost", exam)
    assert other.units.keys() == once.units.keys()


def test_pairs_for_a_reward_model_are_told_by_the_judge_alone(exam: scores.Exam) -> None:
    pairs = scores.human_pairs(exam.texts, {"kind": "length", "characters": 30})
    assert pairs
    for pair in pairs:
        assert abs(len(pair.chosen) - 30) < abs(len(pair.rejected) - 30)


def test_a_fresh_reward_model_pays_a_coins_price_for_each_pair(model: Path, exam: scores.Exam) -> None:
    from llm_from_scratch.finetune.reward import reward_model

    opened, words = open_whole(model)
    paid = scores.pair_units(reward_model(opened), words, exam)
    assert [cost for cost, _ in paid.values()] == pytest.approx([math.log(2)] * len(paid))


def test_a_lora_adapter_is_scored_as_its_base_and_what_it_learned(model: Path, exam: scores.Exam, tmp_path: Path) -> None:
    from llm_from_scratch import bundle
    from llm_from_scratch.finetune import lora

    opened, words = open_whole(model)
    detour = lora.LoraParams(rank=2, alpha=4, dropout=0.0, targets=["v_proj"], chat_tokens=False)
    attached = lora.attach(opened, detour, seed=1)
    with torch.no_grad():
        for weight_name, weight in attached.named_parameters():
            if "lora_B" in weight_name:
                weight.normal_(std=0.1)
    with bundle.writing(tmp_path / "lora") as folder:
        lora.save_adapter(attached, folder, "artifacts/models/base")
        words.save(folder)
        bundle.seal(folder, "adapter", "finetune@tiny", {"base": bundle.read_manifest(model).digest}, tokenizer=tokenizer.digest(folder))
    found = scores.scores_of(tmp_path / "lora", "val_bpb", exam, model)
    beside = Scores("val_bpb", scores.text_units(attached, words, exam.texts)) if hasattr(attached, "context") else None
    assert found.units.keys() == scores.scores_of(model, "val_bpb", exam).units.keys()
    assert found.mean != scores.scores_of(model, "val_bpb", exam).mean
    assert beside is None or beside.mean == pytest.approx(found.mean, rel=1e-5)
    with pytest.raises(ValueError, match="name the folder of its base"):
        scores.scores_of(tmp_path / "lora", "val_bpb", exam)
