"""Merges of models with other tokens: rows are found by token, as mergekit does, and the output reads text."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint_files import load, refusal, refused, reloaded, succeed
from deltafl.checkpoints.rows import Rows

PEER = os.environ.get("DELTAFL_MERGEKIT")
MARKS = ("<unk>", "<s>", "</s>")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = (0.5, 0.7)


def make(
    folder: Path, words: str, *added: str, special: Sequence[str] = (), rows: int = 0, **more: Any
) -> None:
    """A random Llama of width 16 on words, in this order; `rows` of its embedding, if more than tokens."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate((*MARKS, *words.split()))}
    splits = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    splits.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=splits, **marks)
    tokenizer.add_tokens(list(added))
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(len(words) + rows)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    marks = {"bos_token_id": 1, "eos_token_id": 2}
    config = t.LlamaConfig(vocab_size=rows or len(tokenizer), **sizes, **heads, **marks, **more)
    t.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base is padded; m0 has its words in another order, lacks one and adds three; m1 is padded and has a word and a
    mark that m0 has too.
    """
    root = tmp_path_factory.mktemp("vocabulary")
    for name, tied in (("", False), ("tied-", True)):
        tie: dict[str, Any] = {"tie_word_embeddings": tied}
        make(root / f"{name}base", "a b c d", rows=12, **tie)
        make(root / f"{name}m0", "c a b e", "<x>", special=["<p>"], **tie)
        make(root / f"{name}m1", "d e a b c f", special=["<p>"], rows=16, **tie)
    return root


@pytest.fixture
def home(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models."""
    for folder in models.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(*options: object, prefix: str = "", **settings: Any) -> Path:
    names = [f"{prefix}{name}" for name in ("base", "m0", "m1")]
    recipe = {"base": names[0], "models": names[1:], "weights": WEIGHTS, "scaling_coef": 1.0}
    Path("recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(recipe | settings))))
    succeed("merge", "recipe.yaml", "--out", "out", "--overwrite", *options)
    return Path("out")


def vocabulary(folder: Path) -> dict[str, int]:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


RULES = {
    "a": {"model": "m1", "force": True},
    "f": {"model": "base", "token": "d"},
    "<x>": {"force": True},
    "e": {"model": "m0", "token_id": 4},
    "<new>": {"model": "m1", "token": "<p>"},
    "<none>": {},
}
CASES: dict[str, dict[str, Any]] = {
    "union": {"vocabulary": "union"},
    "base": {"vocabulary": "base"},
    "model": {"vocabulary": "m1"},
    "padded": {"vocabulary": "union", "pad_to_multiple_of": 8},
    "tokens": {"vocabulary": "union", "tokens": RULES},
    "tied": {"vocabulary": "union", "prefix": "tied-"},
}


def rows_of(case: dict[str, Any], name: str, tokens: Sequence[str]) -> list[np.ndarray]:
    """The matrices of base, m0 and m1 with a row for each token, as methods2 A14 says; float64."""
    prefix, rules = case.get("prefix", ""), case.get("tokens", {})
    labels = [f"{prefix}{label}" for label in ("base", "m0", "m1")]
    held = {label: load(Path(label))[name].double().numpy() for label in labels}
    ids = {label: vocabulary(Path(label)) for label in labels}

    def default(token: str) -> np.ndarray:
        if token in rules:
            rule = rules[token]
            if "model" not in rule:
                return np.zeros(16)
            row = rule.get("token_id", ids[rule["model"]].get(rule.get("token", token)))
            return held[rule["model"]][row]
        having = [label for label in labels if token in ids[label]]
        having = having[:1] if labels[0] in having else having
        return np.mean([held[label][ids[label][token]] for label in having], 0)

    def row(label: str, token: str) -> np.ndarray:
        own = token in ids[label] and not rules.get(token, {}).get("force")
        return held[label][ids[label][token]] if own else default(token)

    found = [np.stack([row(label, token) for token in tokens]) for label in labels]
    multiple = case.get("pad_to_multiple_of", 1)
    padding = -len(tokens) % multiple
    return [np.concatenate([one, np.tile(one.mean(0), (padding, 1))]) for one in found]


@pytest.mark.parametrize("name", CASES)
def test_rows_are_found_by_token_and_the_output_loads(name: str, home: Path) -> None:
    case = CASES[name]
    out = merge(**case)
    ids = vocabulary(out)
    tokens = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in tokens] == list(range(len(ids)))
    tensors = load(out)
    for tensor in (EMBEDDING,) if name == "tied" else (EMBEDDING, HEAD):
        base, *tuned = rows_of(case, tensor, tokens)
        wanted = base + sum(w * (one - base) for w, one in zip(WEIGHTS, tuned, strict=True))
        np.testing.assert_allclose(tensors[tensor].double().numpy(), wanted, rtol=0, atol=1e-6)
    model = reloaded(out, "AutoModelForCausalLM")
    assert model.config.vocab_size == len(tensors[EMBEDDING])
    assert model(torch.arange(len(ids))[None]).logits.shape[-1] == model.config.vocab_size


def test_the_union_has_the_ids_of_the_base_first_and_plain_tokens_before_added_ones(
    home: Path,
) -> None:
    import transformers

    ids = vocabulary(merge(vocabulary="union"))
    assert sorted(ids, key=ids.__getitem__) == [*MARKS, *"abcdef", "<x>", "<p>"]
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    text = "a e <x> d f<p>"
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found) == ["a", "e", "<x>", "d", "f", "<p>"]
    assert tokenizer.decode(found, skip_special_tokens=True).split() == ["a", "e", "<x>", "d", "f"]
    assert (
        Path("out/tokenizer_config.json").read_bytes()
        == Path("base/tokenizer_config.json").read_bytes()
    )


def test_what_one_model_added_is_matched_as_a_whole_and_words_of_rules_are_not(home: Path) -> None:
    import transformers

    make(home / "marks", "a b", special=["c"])
    out = merge(
        models=["marks"], weights=[1.0], vocabulary="union", tokens={"a": {"model": "base"}}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == vocabulary(Path("base"))
    assert tokenizer.get_added_vocab().keys() == {*MARKS, "c"}
    found = tokenizer("abc ac", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found) == ["<unk>", "c", "a", "c"]


def test_the_vocabulary_of_a_model_comes_with_its_tokenizer_and_what_is_lost_is_said(
    home: Path,
) -> None:
    Path("m1/config.json").rename("m1/kept")
    config = json.loads(Path("m1/kept").read_text())
    try:
        Path("m1/config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
        out = merge(vocabulary="m1")
    finally:
        Path("m1/kept").rename("m1/config.json")
    assert (out / "tokenizer.json").read_bytes() == Path("m1/tokenizer.json").read_bytes()
    written = json.loads((out / "config.json").read_text())
    assert (written["vocab_size"], written["eos_token_id"]) == (10, 9)
    told = succeed("merge", "recipe.yaml", "--dry-run").out
    assert 'note: "m0": the result has no "<x>"\n' in told + "\n"


def test_a_token_new_in_one_fine_tune_has_its_row_whatever_the_weights(home: Path) -> None:
    out = merge(vocabulary="union", method="ties", density=0.2, weights=None, scaling_coef=0.3)
    ids = vocabulary(out)
    for name in (EMBEDDING, HEAD):
        donor = load(Path("m0"))[name][vocabulary(Path("m0"))["<x>"]]
        assert torch.equal(load(out)[name][ids["<x>"]], donor)


def adapter(folder: Path, module: str, shape: tuple[int, int]) -> None:
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "base"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": [module]}))
    stem = f"base_model.model.{module}.lora"
    a, b = torch.ones(1, shape[1]), torch.ones(shape[0], 1)
    save_file({f"{stem}_A.weight": a, f"{stem}_B.weight": b}, folder / "adapter_model.safetensors")


def test_an_adapter_has_the_vocabulary_of_the_base(home: Path) -> None:
    name = "model.layers.0.self_attn.o_proj"
    adapter(home / "lora", name, (16, 16))
    both = merge(models=["m0", "lora"], vocabulary="union", method="task_arithmetic")
    found, ids = load(both), vocabulary(both)
    start, tuned = load(Path("base")), load(Path("m0"))
    moved = (
        start[f"{name}.weight"] + 0.5 * (tuned[f"{name}.weight"] - start[f"{name}.weight"]) + 0.7
    )
    torch.testing.assert_close(found[f"{name}.weight"], moved)
    assert torch.equal(found[HEAD][ids["d"]], start[HEAD][6])
    adapter(home / "rows", "lm_head", (12, 16))
    problems = refused(home, *args("m0", "rows"), "--vocabulary", "union")
    assert problems[-1] == (
        'model "rows": is an adapter, and no whole model, that changes "lm_head.weight", whose rows '
        "are matched by token"
    )
    problem = refusal(home, *args("m0", "lora"), "--vocabulary", "lora")
    assert problem.startswith('vocabulary: "lora" is no whole model of this merge; ')


# Rows


@st.composite
def gathers(draw: st.DrawFn) -> tuple[list[Any], int, int, int]:
    """Rows as their sources in two models of 5 rows, the width, and a span of elements."""
    source = st.tuples(st.sampled_from(["", "m"]), st.integers(0, 4))
    rows = draw(st.lists(st.none() | st.lists(source, max_size=2).map(tuple), min_size=1))
    rows = [(("", 0),), *rows]
    width = draw(st.integers(1, 7))
    start = draw(st.integers(0, width * len(rows) - 1))
    return rows, width, start, draw(st.integers(start + 1, width * len(rows)))


@given(gathers())
def test_any_span_of_rows_is_that_of_the_gathered_matrix(
    case: tuple[list[Any], int, int, int],
) -> None:
    rows, width, start, stop = case
    held = {label: {f"{label}x": torch.randn(5, width)} for label in ("", "m")}
    known = [sources for sources in rows if sources is not None]

    def gathered(sources: Sequence[tuple[str, int]]) -> torch.Tensor:
        parts = [held[label][f"{label}x"][row] for label, row in sources]
        return torch.stack(parts).mean(0) if parts else torch.zeros(width)

    mean = torch.stack([gathered(sources) for sources in known]).mean(0)
    wanted = torch.stack([mean if sources is None else gathered(sources) for sources in rows])
    view = Rows("m", held, {"z": {"": "x", "m": "mx"}}, rows)
    assert view.spec("z").shape == wanted.shape
    torch.testing.assert_close(view.block("z", start, stop), wanted.view(-1)[start:stop])


# Chat templates


def with_template(name: str, template: str) -> None:
    folder = Path(name)
    target = folder.resolve()
    folder.unlink()
    folder.mkdir()
    for file in target.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(template)


def test_chat_templates_by_name_by_text_and_the_most_frequent(home: Path) -> None:
    import transformers

    with_template("base", "{{ 1 }}")
    for name in ("m0", "m1"):
        with_template(name, "{{ 2 }}\n")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    def rendered(wanted: str) -> str:
        out = merge("--chat-template", wanted, vocabulary="union")
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        return str(tokenizer.apply_chat_template(talk, tokenize=False))

    assert rendered("auto") == "2"
    assert rendered("{{ messages[0].content }}!") == "a!"
    assert (
        rendered("chatml") == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )
    assert rendered("mistral") == "<s>[INST] a [/INST] b</s>"
    assert rendered("alpaca") == "### Instruction:\na\n\n### Response:\nb</s>\n\n"
    assert rendered("exaone") == "[|system|][|endofturn|]\n[|user|]a\n[|assistant|]b[|endofturn|]\n"
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
    assert rendered("llama3") == f"<s>{turn('user', 'a')}{turn('assistant', 'b')}"
    told = succeed("merge", "recipe.yaml", "--out", "out", "--overwrite").err
    assert 'model "m0": not the chat template of the base' in told
    assert "choose with --vocabulary m0" in told
    settled = succeed(
        "merge", "recipe.yaml", "--out", "out", "--overwrite", "--chat-template", "auto"
    )
    assert "chat template" not in settled.err


# What is refused


def args(*models: str) -> list[str]:
    return ["merge", "--base", "base", "--models", *models, "--out", "out"]


def test_what_cannot_be_matched_is_one_line(home: Path) -> None:
    both = args("m0", "m1")

    def told(*options: str) -> str:
        return refusal(home, *both, *options)

    assert told("--vocabulary", "m2") == (
        'vocabulary: "m2" is no whole model of this merge; known: base, m0, m1'
    )
    assert told("--vocabulary", "m0", "--tokenizer-from", "m1").startswith("vocabulary says whose")
    assert told("--pad-to-multiple-of", "8").startswith("tokens and pad_to_multiple_of need")
    assert told("--vocabulary", "union", "--as-adapter", "4").startswith(
        "as_adapter: an adapter has"
    )
    assert told("--vocabulary", "union", "--chat-template", "chatlm") == (
        'chat_template: unknown "chatlm"; did you mean "chatml"?'
    )
    assert told("--vocabulary", "union", "--method", "fisher", "--tasks", "a", "b").startswith(
        "vocabulary: fisher runs models"
    )
    for problem in refused(home, *both):
        assert "Find rows by token with --vocabulary union" in problem


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"model": "m3"}, 'vocabulary: "m3" is no whole model of this merge; '),
        ({"model": "m0"}, 'tokens: "f": model "m0" has no token "f"'),
        ({"model": "m0", "token": "<y>"}, 'tokens: "f": model "m0" has no token "<y>"'),
        ({"model": "m0", "token_id": 9}, 'tokens: "f": model "m0" has no row 9'),
        ({"model": "m0", "token_id": 1, "token": "a"}, "tokens.f: give a model, with at most one"),
        ({"token": "a"}, "tokens.f: give a model, with at most one"),
    ],
)
def test_the_row_of_a_token_must_be_there(rule: dict[str, Any], told: str, home: Path) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({"tokens": {"f": rule}, "vocabulary": "union"}))
    command = ["merge", "recipe.yaml", *args("m0", "m1")[1:]]
    assert refusal(home, *command).startswith(told)


def test_a_model_without_a_tokenizer_or_a_token_without_a_row_is_refused(home: Path) -> None:
    import transformers

    with_template("m0", "")
    Path("m0/tokenizer.json").unlink()
    told = refusal(home, *args("m0", "m1"), "--vocabulary", "union")
    assert told.startswith(
        '"m0": has no tokenizer.json that can be read, by which to know its tokens; '
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained("base")
    tokenizer.add_tokens([f"<{i}>" for i in range(6)])
    tokenizer.save_pretrained("m0")
    told = refusal(home, *args("m0", "m1"), "--vocabulary", "union")
    assert told.startswith('"m0": token "<2>" has the id 9, and "lm_head.weight" has 9 rows; ')
    tokenizer = json.loads(Path("base/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["d"] = 8
    with_template("base", "")
    Path("base/tokenizer.json").unlink()
    Path("base/tokenizer.json").write_text(json.dumps(tokenizer))
    told = refusal(home, *args("m1"), "--vocabulary", "union")
    assert told.startswith("vocabulary: the ids of the tokens that are kept have gaps, so none ")
    succeed(*args("m1"), "--vocabulary", "base")
    rows = load(Path("out"))[EMBEDDING]
    torch.testing.assert_close(rows[[6, 7]], rows[[0, 1, 2, 3, 4, 5, 8]].mean(0).expand(2, -1))
    Path("m0/config.json").unlink()
    shutil.rmtree("out")
    told = refusal(home, *args("m0", "m1"), "--vocabulary", "union")
    assert told.startswith(
        '"m0": no embedding has as many rows as the vocab_size of its config.json '
    )


# mergekit itself


def theirs(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """The same merge as a configuration of mergekit's."""
    prefix = case.get("prefix", "")

    def place(name: str) -> str:
        return str((root / f"{prefix}{name}").resolve())

    def row(rule: dict[str, Any]) -> dict[str, Any]:
        if "model" not in rule:
            return {"kind": "zero"}
        found = {"kind": "model_token", "model": place(rule["model"])}
        return found | {key: rule[key] for key in ("token", "token_id") if key in rule}

    source = case["vocabulary"]
    tokens = {
        token: {"source": row({"token": token, **rule} if "token_id" not in rule else rule)}
        | {"force": rule.get("force", False)}
        for token, rule in case.get("tokens", {}).items()
    }  # fmt: skip
    chosen = {
        "source": place(source) if source not in ("union", "base") else source,
        "tokens": tokens,
    }
    pad = {key: case[key] for key in ("pad_to_multiple_of",) if key in case}
    weights = zip(("m0", "m1"), WEIGHTS, strict=True)
    models = [{"model": place(name), "parameters": {"weight": w}} for name, w in weights]
    return {
        "merge_method": "task_arithmetic", "base_model": place("base"), "models": models,
        "dtype": "float32", "tokenizer": chosen | pad,
    }  # fmt: skip


@pytest.mark.peer
@pytest.mark.skipif(PEER is None, reason="DELTAFL_MERGEKIT is not set to a mergekit-yaml program")
@pytest.mark.parametrize("name", CASES)
def test_mergekit_itself_agrees(name: str, home: Path) -> None:
    assert PEER
    case = CASES[name]
    Path("mergekit.yaml").write_text(yaml.safe_dump(theirs(case, home)))
    subprocess.run([PEER, "mergekit.yaml", "theirs", "--quiet"], check=True, capture_output=True)
    out = merge(**case)
    ours, other = vocabulary(out), vocabulary(Path("theirs"))
    assert ours.keys() == other.keys()
    a, b = load(out), load(Path("theirs"))
    assert a.keys() == b.keys()
    for tensor in a:
        assert a[tensor].shape == b[tensor].shape
        order = [other[token] for token in sorted(ours, key=ours.__getitem__)]
        rows = [*order, *range(len(order), len(a[tensor]))]
        wanted = b[tensor][rows] if tensor in (EMBEDDING, HEAD) else b[tensor]
        torch.testing.assert_close(a[tensor], wanted, rtol=0, atol=1e-6)
