"""Alignment: which of two answers is better, and how to write more of those without forgetting how to write."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from llm_from_scratch import bundle
from llm_from_scratch.data.chat import RecordError
from llm_from_scratch.data.preferences import Preference, read_preferences, write_preferences
from llm_from_scratch.evaluation import alignment
from llm_from_scratch.evaluation.alignment import Exam, best_of, distinct, divergences, learned_rewards
from llm_from_scratch.evaluation.splits import split_preferences
from llm_from_scratch.finetune import FinetuneParams, dpo, grpo, policy, ppo, reward, rollouts
from llm_from_scratch.finetune.judge import JudgeParams, judge
from llm_from_scratch.finetune.pairs import PairLesson, answers, encode_pairs, judged, openings, stack
from llm_from_scratch.finetune.rollouts import PromptLesson, Rollout, roll_out
from llm_from_scratch.inference.batched import by_length, draw
from llm_from_scratch.inference.sampling import Sampling, generate
from llm_from_scratch.model.llama import Llama
from llm_from_scratch.model.registry import load_model
from llm_from_scratch.tokenizer import BpeTokenizer, load
from llm_from_scratch.training.loop import fit
from llm_from_scratch.training.memory import UNSCORED
from llm_from_scratch.training.resume import Journal
from tests.test_finetune import PLAN
from tests.tiny import SENTENCES, tiny_model

SHORT = {**PLAN, "context": 64, "batch": 4, "steps": 8, "evaluate_every": 4, "checkpoint_every": 4, "learning_rate": 0.003}
ALIGN = {
    "model": "base",
    "guide": "reward",
    "records": "animals",
    "questions": 6,
    "samples": 2,
    "prompt_tokens": 3,
    "answer_tokens": 6,
    **SHORT,
}
FOLLOW = {**ALIGN, "text_weight": 0.5, "text_tokens": 8}
DPO = {**FOLLOW, "method": "dpo", "variant": "dpo", "beta": 0.1}
ONLINE = {**FOLLOW, "rollout": 8, "epochs": 2, "clip_range": 0.2, "stop_kl": 10.0}
PPO = {
    **ONLINE, "method": "ppo", "beta": 0.05, "target_kl": 4.0, "horizon": 100, "discount": 1.0, "trace": 0.95,
    "value_weight": 0.1, "whiten_rewards": True,
}  # fmt: skip
GRPO = {**ONLINE, "method": "grpo", "group": 4, "beta": 0.04}
REWARD = {
    **ALIGN, "method": "reward", "guide": "base", "judge": {"kind": "length", "characters": 12}, "prompts": 12, "answers_each": 3,
}  # fmt: skip


def parse(section: dict[str, Any]) -> Any:
    return TypeAdapter(FinetuneParams).validate_python(section)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("align") / "base")


@pytest.fixture
def base(base_folder: Path) -> Llama:
    model = load_model(base_folder)
    assert isinstance(model, Llama)
    return model


@pytest.fixture(scope="module")
def words(base_folder: Path) -> BpeTokenizer:
    found = load(base_folder)
    assert isinstance(found, BpeTokenizer)
    return found


def prompts(words: BpeTokenizer, count: int = 8) -> list[list[int]]:
    return (openings(SENTENCES, words, 3) * count)[:count]


def text_ids(words: BpeTokenizer) -> np.ndarray:
    return np.array([token for sentence in SENTENCES for token in words.encode(sentence)])


def scorer(base: Llama) -> reward.RewardModel:
    """A reward model that says something."""
    made = reward.reward_model(copy.deepcopy(base))
    torch.manual_seed(3)
    torch.nn.init.normal_(made.score.weight)
    return made.requires_grad_(False).eval()


def lesson_of(base: Llama, words: BpeTokenizer) -> PromptLesson:
    return PromptLesson(
        prompts(words), text_ids(words), scorer(base), frozenset(words.special.values()), words.eot, words.special["<|end|>"]
    )


def exam(base: Llama, words: BpeTokenizer, **changes: Any) -> Exam:
    told = {
        "prompts": prompts(words),
        "new": 6,
        "words": words,
        "judge": len,
        "reference": base,
        "reward": scorer(base),
        "text": text_ids(words),
        "seed": 1,
    }
    return Exam(**{**told, **changes})


# Params


def test_saves_fall_between_rollouts_because_the_policy_that_wrote_one_is_gone_in_the_middle() -> None:
    assert parse(PPO).updates == 4
    with pytest.raises(ValidationError, match="a rollout is good for 4 steps, and checkpoint_every is 6; set that to a multiple of 4"):
        parse({**PPO, "checkpoint_every": 6})
    with pytest.raises(ValidationError, match="6 answers are no whole number of batches of 4; set it to a multiple of 4"):
        parse({**PPO, "rollout": 6})
    with pytest.raises(ValidationError, match="a rollout of 8 answers is no whole number of groups of 3"):
        parse({**GRPO, "group": 3})


# The gold judge


def test_a_judge_is_a_lexicon_a_length_a_pattern_or_any_function() -> None:
    def made(**section: Any) -> Any:
        return judge(TypeAdapter(JudgeParams).validate_python(section))

    vader = made(kind="vader")
    assert vader("a great and lovely day") > 0.5 > 0 > -0.5 > vader("a horrible, deadly war")
    assert made(kind="length", characters=4)("four") == 0
    assert made(kind="length", characters=4)("") == made(kind="length", characters=4)("eightlet") == -1
    assert made(kind="pattern", pattern=r"\d")("a1b2") == 50
    assert made(kind="callable", function="math:sqrt") is not None
    assert made(kind="callable", function="builtins:len")("four") == 4.0
    with pytest.raises(ValueError, match=r"judge nowhere:at_all: No module named 'nowhere'; name it package\.module:function"):
        made(kind="callable", function="nowhere:at_all")
    with pytest.raises(ValidationError, match="is no regular expression"):
        made(kind="pattern", pattern="(")


# Preference files


def test_preferences_are_read_in_the_shapes_that_people_have_them_in(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hi?"}
    rows: list[dict[str, Any]] = [
        {"prompt": "Once", "chosen": " upon a time", "rejected": " twice"},
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
        {
            "prompt": "Hi?",
            "chosen": [user, {"role": "assistant", "content": "Hello."}],
            "rejected": [user, {"role": "assistant", "content": "No."}],
        },
        {"prompt": [user], "chosen": "Hello.", "rejected": "No."},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    found = read_preferences(file)
    assert found[0] == Preference("Once", " upon a time", " twice")
    assert found[1] == found[2] == found[3] == Preference([{"role": "user", "content": "Hi?"}], "Hello.", "No.")
    write_preferences(tmp_path / "again.jsonl", found)
    assert read_preferences(tmp_path / "again.jsonl") == found


def test_every_bad_preference_is_named_by_its_line_and_none_is_used(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    bad = ["{", json.dumps({"chosen": "x"}), json.dumps({**good, "rejected": "b"}), json.dumps({**good, "chosen": ""})]
    file.write_text("\n".join([json.dumps(good), *bad]))
    with pytest.raises(RecordError) as caught:
        read_preferences(file)
    said = str(caught.value)
    assert "4 of 5 records are bad: line 2: not JSON" in said
    assert "line 3: wanted an object with chosen and rejected" in said
    assert "line 4: chosen and rejected are the same" in said
    assert "line 5: chosen: found '', wanted some text" in said
    assert "\n" not in said


def test_preferences_about_one_prompt_are_learned_or_held_out_together(tmp_path: Path) -> None:
    made = [Preference(f"prompt {number // 2}", f"good {number}", "bad") for number in range(40)]
    write_preferences(tmp_path / "pairs.jsonl", made)
    learned, held_out = split_preferences(tmp_path, 0.3)
    assert len(learned) + len(held_out) == 40
    assert held_out
    assert not {one.prompt for one in learned} & {one.prompt for one in held_out}


# Drawing many texts at once


def test_texts_drawn_together_are_those_that_are_drawn_alone(base: Llama, words: BpeTokenizer) -> None:
    """Greedy, each row is what the one-at-a-time engine writes; a row that has ended says no more."""
    asked = prompts(words, 4)
    ends = {words.eot}
    ids, drawn = draw(base, torch.tensor(asked), 8, ends, torch.Generator(), temperature=0)
    for prompt, row, said in zip(asked, ids.tolist(), drawn.tolist(), strict=True):
        alone = list(generate(base, prompt, Sampling(temperature=0, max_tokens=8), words.eot))
        assert [token for token, inside in zip(row, said, strict=True) if inside and token != words.eot] == alone


def test_drawn_tokens_come_as_often_as_the_model_thinks_they_should(base: Llama, words: BpeTokenizer) -> None:
    prompt = torch.tensor([[words.eot, 5, 9]])
    with torch.no_grad():
        wanted = base(prompt)[0, -1].softmax(-1)
    ids, _ = draw(base, prompt.expand(20_000, -1), 1, set(), torch.Generator().manual_seed(0))
    found = torch.bincount(ids[:, 0], minlength=base.vocab_size) / 20_000
    assert (found - wanted).abs().max() < 5 * math.sqrt(0.25 / 20_000)


def test_behind_its_end_an_answer_is_not_drawn(base: Llama, words: BpeTokenizer) -> None:
    everything = set(range(base.vocab_size))
    ids, drawn = draw(base, torch.tensor(prompts(words, 3)), 5, everything, torch.Generator().manual_seed(0))
    assert drawn.tolist() == [[True, False, False, False, False]] * 3
    assert (ids == ids[:, :1]).all()
    with pytest.raises(ValueError, match="125 new ones are more than the model's context of 128"):
        draw(base, torch.tensor(prompts(words, 3)), 125, everything, torch.Generator())


def test_prompts_are_grouped_by_length() -> None:
    assert by_length([[1], [1, 2], [3], [4], [5, 6]], 2) == [[0, 2], [3], [1, 4]]


# The reward model


def test_bradley_and_terry_by_hand() -> None:
    assert reward.bradley_terry(torch.zeros(3), torch.zeros(3)).item() == pytest.approx(math.log(2))
    assert reward.bradley_terry(torch.tensor([math.log(3.0)]), torch.zeros(1)).item() == pytest.approx(-math.log(0.75))
    assert reward.accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(0.625)


def test_calibration_says_how_often_it_was_right_where_it_said_so() -> None:
    sure, unsure = math.log(0.95 / 0.05), math.log(0.55 / 0.45)
    rows = reward.calibration(torch.tensor([sure, sure, -sure, unsure]), 5)
    assert [(row["pairs"], round(row["said"], 2), round(row["right"], 2)) for row in rows] == [(1, 0.55, 1.0), (3, 0.95, 0.67)]


def test_a_saved_reward_model_is_a_classifier_to_transformers(base: Llama, words: BpeTokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    ours = scorer(base)
    reward.save_reward(ours, tmp_path, words.eot)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    rows = [[1, 2, 3, 4, 5], [7, 8, 9]]
    ids = torch.tensor([row + [words.eot] * (5 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (5 - len(row)) for row in rows])
    with torch.no_grad():
        wanted = theirs(ids, attention_mask=mask).logits[:, 0]
        found = ours(ids, torch.tensor([4, 2]))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reward.load_reward(tmp_path)(ids, torch.tensor([4, 2])), found, atol=0, rtol=0)


def test_a_model_without_a_score_is_no_reward_model(base_folder: Path) -> None:
    with pytest.raises(
        bundle.BundleError, match=r"has no score\.weight, so it is no reward model; name a bundle that the method reward made"
    ):
        reward.load_reward(base_folder)


def test_the_reward_is_read_at_the_last_token_of_an_answer(words: BpeTokenizer) -> None:
    pairs, skipped = encode_pairs([Preference("The cat", " is small", " is"), Preference("A" * 200, "b", "c")], words, 64)
    assert skipped == 1
    ids, targets = stack(pairs, words.eot)
    for side, row in enumerate((pairs[0].chosen, pairs[0].rejected)):
        place = reward.last_places(targets)[0, side]
        assert ids[0, side, place] == row.ids[-1]
        inside = targets[0, side] != UNSCORED
        assert tuple(targets[0, side][inside].tolist()) == row.ids[row.start :]
    with pytest.raises(ValueError, match="none of 1 preferences fits a context of 4 tokens"):
        encode_pairs([Preference("The cat", " is small", " is")], words, 4)


def test_a_reward_model_learns_whom_the_judge_likes(base: Llama, words: BpeTokenizer) -> None:
    """Cats rather than dogs, in company that it has not seen; before it has learned, its head of zeros likes nobody."""
    others = ("river", "star", "sea", "gas", "water", "sphere", "people", "animal")
    made = [
        Preference(f"The {one}", f" and the cat and the {other}", f" and the dog and the {other}") for one in others for other in others
    ]
    random.Random(0).shuffle(made)
    pairs, _ = encode_pairs(made, words, 64)
    told = parse({**REWARD, "steps": 60, "batch": 16, "learning_rate": 0.01, "embedding_learning_rate": 0.01})
    job = reward.job(base, PairLesson(made[:40], pairs[:40], text_ids(words), words.eot, words.special["<|end|>"]), told)
    assert reward.accuracy(reward.margins(job.model, pairs[40:], words.eot, 16)) == 0.5
    fit(job.model, job.batches, job.loss, told)
    assert reward.accuracy(reward.margins(job.model, pairs[40:], words.eot, 16)) > 0.9


def test_the_best_answer_is_paired_with_the_worst_and_the_second_best_with_the_second_worst(base: Llama, words: BpeTokenizer) -> None:
    asked = prompts(words, 20)
    made = judged(base, asked, 6, 4, words, len, seed=1)
    said = [words.decode(answer) for answer in answers(base, [prompt for prompt in asked for _ in range(4)], 6, words, seed=1)]
    wanted = []
    for place in range(0, len(said), 4):
        texts = sorted((text for text in said[place : place + 4] if text.strip()), key=lambda text: (len(text), text))
        wanted += [(texts[-1 - rank], texts[rank]) for rank in range(len(texts) // 2) if len(texts[-1 - rank]) > len(texts[rank])]
    assert [(one.chosen, one.rejected) for one in made] == wanted
    assert all(len(one.chosen) > len(one.rejected) for one in made)
    assert judged(base, prompts(words, 5), 6, 3, words, lambda text: 0.0, seed=1) == []


# DPO


def test_dpo_starts_at_the_logarithm_of_two_and_ipo_at_its_margin(base: Llama, words: BpeTokenizer) -> None:
    pairs, _ = encode_pairs([Preference("The cat", " is small", " barks"), Preference("A star", " shines", " is a dog")], words, 64)
    for variant, start in (("dpo", dpo.START), ("ipo", 25.0)):
        told = parse({**DPO, "variant": variant, "text_weight": 0.0})
        batch = dpo.batches(base, pairs, text_ids(words), words.eot, told)(0)
        assert dpo.loss(told)(base, batch).item() == pytest.approx(start, rel=1e-5)


def test_dpo_by_hand() -> None:
    """A chosen answer 3 nats likelier than before, a rejected one 1 nat less: sigmoid of 0.1 * 4."""
    found = dpo.dpo(torch.tensor([3.0]), torch.tensor([-1.0]), 0.1)
    assert found.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.4))), rel=1e-6)
    assert dpo.ipo(torch.tensor([3.0]), torch.tensor([-1.0]), 0.1).item() == pytest.approx((4 - 5) ** 2)


@pytest.mark.parametrize("variant", ["dpo", "ipo"])
def test_the_loss_is_that_of_trl_for_the_same_policy_reference_and_pairs(
    variant: str, base_folder: Path, tmp_path: Path, words: BpeTokenizer
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    other = tiny_model(tmp_path / "other", seed=9)
    rows = [
        {"prompt": "The cat", "chosen": " is a small animal", "rejected": " barks"},
        {"prompt": "A river", "chosen": " runs", "rejected": " is a sphere of gas that shines"},
    ]
    theirs = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (other, base_folder)]
    tokens = PreTrainedTokenizerFast.from_pretrained(base_folder)
    tokens.pad_token = tokens.eos_token = "<|endoftext|>"
    arguments = DPOConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, beta=0.1, loss_type=["sigmoid" if variant == "dpo" else "ipo"],
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, dataset_num_proc=None, max_length=64,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=theirs[0], ref_model=theirs[1], args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokens
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        wanted = trainer._compute_loss(trainer.model.eval(), dict(batch), return_outputs=False)

    ids = batch["input_ids"].unflatten(0, (2, -1)).transpose(0, 1)  # theirs is all chosen, then all rejected
    answered = batch["completion_mask"].unflatten(0, (2, -1)).transpose(0, 1).bool()
    labels = torch.full_like(ids, UNSCORED)
    labels[:, :, :-1] = torch.where(answered[:, :, 1:], ids[:, :, 1:], UNSCORED)
    ours, reference = load_model(other), load_model(base_folder)
    assert isinstance(ours, Llama)
    assert isinstance(reference, Llama)
    with torch.no_grad():
        there = dpo.answer_log_probs(reference, ids, labels)
        told = parse({**DPO, "variant": variant, "text_weight": 0.0})
        found = dpo.loss(told)(ours, (ids, ids[:, :1, 0], labels, there, ids[:, 0], ids[:, 0]))
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_dpo_makes_the_chosen_answers_likelier_than_the_rejected_ones(base: Llama, words: BpeTokenizer) -> None:
    preferences = [Preference("The cat", " is small", " barks"), Preference("A star", " shines", " is a dog")]
    pairs, _ = encode_pairs(preferences, words, 64)
    told = parse({**DPO, "text_weight": 0.0})
    job = dpo.job(base, PairLesson(preferences, pairs, text_ids(words), words.eot, words.special["<|end|>"]), told)
    fit(job.model, job.batches, job.loss, told)
    assert job.loss(job.model, job.batches(0)).item() < dpo.START - 0.1


# PPO


def rollout(rewards: Tensor, scored: Tensor, gap: float = 0.0) -> Rollout:
    zeros = torch.zeros(scored.shape)
    return Rollout(zeros.long(), torch.where(scored, 1, UNSCORED), zeros, zeros - gap * scored, rewards)


def test_the_clipped_surrogate_by_hand() -> None:
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0])
    assert rollouts.clipped(ratio, advantages, 0.2).tolist() == pytest.approx([-2.0, -1.2, 1.5, -0.5, 0.8])


def test_a_gradient_step_makes_what_went_well_likelier_and_stops_pushing_beyond_the_clip() -> None:
    for now, advantage, sign in ((0.0, 1.0, -1), (0.0, -1.0, 1), (0.5, 1.0, 0), (-0.5, -1.0, 0), (0.5, -1.0, 1), (-0.5, 1.0, -1)):
        log_prob = torch.tensor([now], requires_grad=True)
        rollouts.clipped(log_prob.exp(), torch.tensor([advantage]), 0.2).sum().backward()
        assert log_prob.grad is not None
        assert math.copysign(1, log_prob.grad.item()) * (log_prob.grad.item() != 0) == sign


def slow_advantages(rewards: list[float], values: list[float], discount: float, trace: float) -> list[float]:
    """The sum that defines it (Schulman et al. 2016, equation 16)."""
    values = [*values, 0.0]
    errors = [reward + discount * values[place + 1] - values[place] for place, reward in enumerate(rewards)]
    return [sum((discount * trace) ** ahead * error for ahead, error in enumerate(errors[place:])) for place in range(len(errors))]


def test_advantages_are_the_sums_that_define_them_wherever_an_answer_begins_and_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 7, generator=generator), torch.randn(3, 7, generator=generator)
    spans = [(0, 7), (2, 6), (3, 4)]
    scored = torch.tensor([[start <= place < end for place in range(7)] for start, end in spans])
    found = ppo.gae(rewards * scored, values * scored, scored, 0.9, 0.8)
    for row, (start, end) in enumerate(spans):
        wanted = slow_advantages(rewards[row, start:end].tolist(), values[row, start:end].tolist(), 0.9, 0.8)
        assert found[row, start:end].tolist() == pytest.approx(wanted, abs=1e-5)
        assert (found[row][~scored[row]] == 0).all()


def test_each_token_pays_for_its_distance_and_the_last_one_earns_the_reward() -> None:
    scored = torch.tensor([[False, True, True, False], [False, True, True, True]])
    found = ppo.token_rewards(rollout(torch.tensor([2.0, 3.0]), scored, gap=1.0), beta=0.5, whiten=False)
    assert found.tolist() == [[0, -0.5, 1.5, 0], [0, -0.5, -0.5, 2.5]]
    white = ppo.token_rewards(rollout(torch.tensor([2.0, 3.0]), scored, gap=1.0), beta=0.5, whiten=True)
    inside = white[scored]
    assert float(inside.var(unbiased=False)) == pytest.approx(1, rel=1e-4)
    assert rollout(torch.zeros(2), scored, gap=1.0).kl == 2.5


def test_whitened_numbers_have_no_mean_and_unit_variance_where_they_count() -> None:
    mask = torch.tensor([[True, True, False, True]])
    found = policy.whitened(torch.tensor([[1.0, 2.0, 99.0, 6.0]]), mask)
    assert found[0, 2] == 0
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(found[mask].var(unbiased=False)) == pytest.approx(1, rel=1e-5)


def test_beta_goes_up_where_the_policy_is_too_far_and_by_a_fifth_at_most() -> None:
    assert ppo.adapted(4.0, 4.0, 0.5) == 1
    assert ppo.adapted(4.4, 4.0, 0.5) == pytest.approx(1.05)
    assert ppo.adapted(400.0, 4.0, 0.5) == pytest.approx(1.1)
    assert ppo.adapted(0.0, 4.0, 0.5) == pytest.approx(0.9)


def test_a_value_that_moved_too_far_is_held_to_its_old_place() -> None:
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.1]])
    assert ppo.value_errors(values, old, returns, 0.2).tolist() == [[pytest.approx(0.32), 0.0]]


def test_at_the_first_update_the_policy_is_the_one_that_wrote(base: Llama, words: BpeTokenizer) -> None:
    """So every ratio is 1, and the surrogate is minus the mean of the whitened advantages: 0."""
    told = parse(PPO)
    run = ppo.Ppo(base, lesson_of(base, words), told)
    ids, targets, written, values, _, returns, *_ = run.batches(0)
    logits, _ = run.model(ids)
    torch.testing.assert_close(policy.log_probs(logits, targets), written, atol=1e-4, rtol=1e-4)
    assert (values == 0).all()  # the head starts at zero
    assert returns.shape == targets.shape
    run.stopped = True
    nothing = run.loss(run.model, run.batches(1))
    assert not nothing.requires_grad


def test_a_rollout_is_scored_as_the_reward_model_and_the_reference_score_its_text(base: Llama, words: BpeTokenizer) -> None:
    asked = torch.tensor(prompts(words, 4))
    made = lesson_of(base, words)
    found = roll_out(base, base, made, asked, 6, seed=1)
    assert found.kl == pytest.approx(0, abs=1e-5)
    said = [row[scored].tolist() for row, scored in zip(found.targets, found.scored, strict=True)]
    texts = [answer[:-1] if answer[-1] in made.ends else answer for answer in said]
    alone = [
        float(made.reward(torch.tensor([[*prompt, *text]]), torch.tensor([len(prompt) + len(text) - 1])))
        for prompt, text in zip(asked.tolist(), texts, strict=True)
    ]
    assert found.rewards.tolist() == pytest.approx(alone, abs=1e-4)


def test_text_beside_the_rows_counts_by_its_weight(base: Llama, words: BpeTokenizer) -> None:
    """What a step loses is what it loses without, and the nats a token of the windows, so many times."""
    made = lesson_of(base, words)
    for method, section in ((ppo.Ppo, PPO), (grpo.Grpo, GRPO)):
        losses = []
        for weight in (0.0, 0.5):
            run: Any = method(copy.deepcopy(base), made, parse({**section, "text_weight": weight}))
            batch = run.batches(0)
            losses.append(run.loss(run.model, batch).item())
        with torch.no_grad():
            nats = torch.nn.functional.cross_entropy(base(batch[-2]).flatten(0, 1), batch[-1].flatten())
        assert losses[1] - losses[0] == pytest.approx(0.5 * float(nats), rel=1e-4)


# GRPO


def test_answers_to_one_prompt_are_each_others_expectation() -> None:
    found = grpo.relative(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    assert found.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5), 0, 0], abs=1e-4)


def test_the_estimated_distance_is_zero_at_home_never_negative_and_right_on_average() -> None:
    p, q = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    each = grpo.distance(p.log(), q.log())
    assert (each > 0).all()
    assert float((p * each).sum()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert grpo.distance(p.log(), p.log()).tolist() == [0, 0, 0]


# All of them


@pytest.mark.parametrize("section", [PPO, GRPO], ids=["ppo", "grpo"])
def test_what_the_reward_model_likes_is_written_more_often(section: dict[str, Any], base: Llama, words: BpeTokenizer) -> None:
    """In answers of two tokens, so that it takes few of them to find out which token was the good one."""
    changes = {"steps": 96, "rollout": 64, "batch": 32, "answer_tokens": 2, "text_weight": 0.0, "beta": 0.01}
    told, made, start = parse({**section, **changes}), lesson_of(base, words), copy.deepcopy(base)
    asked = exam(start, words, reward=made.reward, prompts=prompts(words, 64), new=2)
    before = alignment.glance(base, asked)
    job = (ppo if told.method == "ppo" else grpo).job(base, made, told)
    fit(job.model, job.batches, job.loss, told)
    after = alignment.glance(job.plain(), asked)
    assert after["learned"] > before["learned"] + 0.3
    assert after["kl"] > 0 == round(before["kl"], 4)


class Killed(Exception):
    """As if the process had ended."""


@pytest.mark.parametrize("section", [REWARD, DPO, PPO, GRPO], ids=lambda section: section["method"])
def test_a_run_that_was_killed_ends_in_the_bits_of_one_that_was_not(
    section: dict[str, Any], base_folder: Path, words: BpeTokenizer, tmp_path: Path
) -> None:
    told = parse(section)
    preferences = [Preference("The cat", " is small", " barks"), Preference("A star", " shines", " is a dog")] * 3
    pairs, _ = encode_pairs(preferences, words, 64)

    def started() -> Any:
        base = load_model(base_folder)
        assert isinstance(base, Llama)
        lesson: Any = PairLesson(preferences, pairs, text_ids(words), words.eot, words.special["<|end|>"])
        if told.method in ("ppo", "grpo"):
            lesson = lesson_of(base, words)
        return {"reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo}[told.method].job(base, lesson, told)

    whole = started()
    fit(whole.model, whole.batches, whole.loss, told)

    def until(step: int, batches: Any) -> Any:
        def at(now: int) -> Any:
            if now == step:
                raise Killed
            return batches(now)

        return at

    journal = Journal(tmp_path / "run")
    for step in (5, 6):
        job = started()
        with pytest.raises(Killed):
            fit(job.model, until(step, job.batches), job.loss, told, journal=journal)
    job = started()
    fitted = fit(job.model, job.batches, job.loss, told, journal=journal)
    assert fitted.resumed_at == 4
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, job.model.state_dict()[name]), name


@pytest.mark.parametrize("section", [DPO, PPO, GRPO], ids=lambda section: section["method"])
def test_a_policy_is_saved_as_a_model_that_transformers_opens(
    section: dict[str, Any], base: Llama, words: BpeTokenizer, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    told = parse(section)
    preferences = [Preference("The cat", " is small", " barks")]
    lesson: Any = PairLesson(preferences, encode_pairs(preferences, words, 64)[0], text_ids(words), words.eot, words.special["<|end|>"])
    job = {"dpo": dpo, "ppo": ppo, "grpo": grpo}[told.method].job(base, lesson if told.method == "dpo" else lesson_of(base, words), told)
    fit(job.model, job.batches, job.loss, told)
    job.save(tmp_path, "artifacts/models/base")
    ids = torch.randint(0, base.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(job.plain()(ids), theirs, atol=1e-4, rtol=1e-4)
    assert (tmp_path / ppo.VALUE_HEAD).exists() == (told.method == "ppo")


# The evidence


def test_the_distance_is_the_mean_of_what_the_answers_say_of_it(
    base: Llama, base_folder: Path, words: BpeTokenizer, tmp_path: Path
) -> None:
    """Against a slow sum over single tokens, with answers of several lengths; to itself it is nothing."""
    other = load_model(tiny_model(tmp_path / "other", seed=5))
    assert isinstance(other, Llama)
    asked = prompts(words, 4)
    said = [[7], [8, 9, 10], [11, 12], [13, 14, 15, 16]]
    assert divergences(base, base, asked, said, words.eot) == [0.0] * 4
    found = divergences(base, other, asked, said, words.eot)
    for prompt, answer, nats in zip(asked, said, found, strict=True):
        slow = 0.0
        for place, token in enumerate(answer):
            with torch.no_grad():
                p, q = (model(torch.tensor([[*prompt, *answer[:place]]]))[0, -1].log_softmax(-1)[token] for model in (base, other))
            slow += float(p - q)
        assert nats == pytest.approx(slow, abs=1e-4)


def test_best_of_one_is_the_start_and_more_to_choose_from_is_never_liked_less(base: Llama, words: BpeTokenizer) -> None:
    rows = best_of(exam(base, words), 8)
    assert [row["n"] for row in rows] == [1, 2, 4, 8]
    assert rows[0]["kl"] == 0
    assert rows[1]["kl"] == pytest.approx(math.log(2) - 0.5)
    learned = [row["learned"] for row in rows]
    assert learned == sorted(learned)
    assert learned[-1] > learned[0]


def test_the_best_of_n_is_a_mean_over_every_choice_of_n_answers() -> None:
    """Against all of them, one by one; the judge is of another opinion than the reward model."""
    draw = np.random.default_rng(0)
    learned, gold = draw.normal(size=(3, 8)), draw.normal(size=(3, 8))
    for row in alignment.best_curve(learned, gold):
        choices = [list(choice) for choice in itertools.combinations(range(8), int(row["n"]))]
        best = [(prompt, choice[int(learned[prompt, choice].argmax())]) for prompt in range(3) for choice in choices]
        assert row["learned"] == pytest.approx(np.mean([learned[place] for place in best]))
        assert row["gold"] == pytest.approx(np.mean([gold[place] for place in best]))


def test_distinct_bigrams_fall_when_all_answers_are_one() -> None:
    assert distinct([["a", "b", "c"], ["c", "d"]], 2) == 1.0
    assert distinct([["a", "b"]] * 4, 2) == 0.25
    assert distinct([["a"], []], 2) == 0.0


def test_a_standing_is_the_same_each_time_it_is_taken(base: Llama, words: BpeTokenizer) -> None:
    first, second = (alignment.examine(base, exam(base, words)) for _ in range(2))
    assert first == second
    assert first.kl == 0
    assert first.gold == pytest.approx(np.mean([len(answer) for answer in first.answers]))
    assert first.metrics()["val_ppl"] == pytest.approx(math.exp(first.val_loss))


def test_an_answers_reward_does_not_depend_on_its_neighbours(base: Llama, words: BpeTokenizer) -> None:
    asked, said = prompts(words, 3), [[7], [8, 9, 10], [11, 12]]
    together = learned_rewards(scorer(base), asked, said, words.eot)
    alone = [learned_rewards(scorer(base), [prompt], [answer], words.eot)[0] for prompt, answer in zip(asked, said, strict=True)]
    assert together == pytest.approx(alone, abs=1e-4)


def test_answers_end_where_the_model_ends_them(base: Llama, words: BpeTokenizer) -> None:
    for answer in answers(base, prompts(words, 6), 6, words, seed=2):
        assert len(answer) <= 6
        assert not set(answer) & set(words.special.values())
