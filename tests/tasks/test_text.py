"""Text out of tables: what is read, what becomes tokens, what is learnt, and what is refused."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataset_files import sizes
from torch import Tensor

from checkpoint_files import fails
from deltafl.models import Net, load_net
from deltafl.tasks import DataRecipe, ImageInput, TextTask, load_task
from deltafl.tasks.task import SPLITS, require_examples
from deltafl.tasks.text import IGNORED, WORST
from tiny_models import tiny_llama

TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template; the tiny tokenizer's EOS is </s>."""


@pytest.fixture
def net(tmp_path: Path) -> Net:
    return tiny_llama(tmp_path / "llama")


@pytest.fixture
def chat(tmp_path: Path) -> Net:
    """A model with a chat template."""
    tiny_llama(tmp_path / "llama")
    (tmp_path / "llama" / "chat_template.jinja").write_text(TURNS)
    return load_net(tmp_path / "llama" / "config.json")


def rows(count: int, **more: object) -> list[dict]:
    return [{"question": f"{i} and 1?", "answer": f"it is {i + 1}", **more} for i in range(count)]


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("\n".join(map(json.dumps, rows)))
    return file


def load(net: Net, data: object, seed: int = 0, **settings: object) -> TextTask:
    task = load_task(DataRecipe.of(data=str(data), **settings), net.inputs, seed)
    assert isinstance(task, TextTask)
    return task


def told(net: Net, task: TextTask, split: str = "train") -> list[tuple[str, str]]:
    """Prompt and answer of each example, special tokens too."""
    own, decode = task.splits[split], net.inputs.tokenizer.decode
    starts = own.starts.tolist()
    cut = [(ids[:start], ids[start:]) for ids, start in zip(own.ids, starts, strict=True)]
    return [(decode(asked.long()), decode(answer.long())) for asked, answer in cut]


ASKED = {"prompt": "question", "response": "answer"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_set_of_a_folder_is_the_same_in_every_format(suffix, net, tmp_path):
    write_rows(tmp_path / "in" / f"sums_train.{suffix}", rows(40))
    write_rows(tmp_path / "in" / f"sums_test.{suffix}", rows(3))
    write_rows(tmp_path / "in" / f"other_test.{suffix}", rows(5))
    task = load(net, tmp_path / "in" / "sums", **ASKED)
    assert (task.name, task.metric, task.ratio_scaled) == ("sums", "log-likelihood", False)
    assert sizes(task) == [38, 2, 3]
    assert told(net, task, "test")[2] == ("2 and 1?\n", "it is 3</s>")
    by_name = load(net, "sums", data_dir=str(tmp_path / "in"), **ASKED)
    assert task.fingerprint() == by_name.fingerprint()
    assert sizes(load(net, tmp_path / "in" / "sums", val_fraction=0.5, **ASKED)) == [20, 20, 3]
    assert load(net, tmp_path / "in" / "sums", 1, **ASKED).fingerprint() != task.fingerprint()
    fails("holds several data sets", load, net, tmp_path / "in")


def test_tokens_are_made_once(net, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "sums.jsonl", rows(40))
    first = load(net, file, **ASKED)

    def open_tables(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("deltafl.tasks.tables.open_tables", open_tables)
    assert load(net, file, **ASKED).fingerprint() == first.fingerprint()
    with pytest.raises(AssertionError):
        load(net, file, template="plain", **ASKED)


def test_a_file_without_splits_has_the_same_test_part_whatever_the_seed(net, tmp_path):
    file = write_rows(tmp_path / "sums.json", rows(100))
    one, two = (load(net, file, seed, **ASKED) for seed in (0, 1))
    assert sizes(one) == sizes(two) == [90, 5, 5]
    assert told(net, one, "test") == told(net, two, "test")
    assert told(net, one, "val") != told(net, two, "val")
    parts = [text for split in SPLITS for text in told(net, one, split)]
    assert len({*parts}) == len(parts)


def test_the_catalogue_knows_columns_and_rows(net, tmp_path):
    many = [{"text": f"{i}?", "code": "c", "test_list": ["a", "b"]} for i in range(974)]
    mbpp = load(net, write_rows(tmp_path / "mbpp.jsonl", many))
    assert sizes(mbpp) == [374, 90, 500]
    first = told(net, mbpp, "test")[0]
    assert first == ("10?\nThe code must pass these tests:\na\nb\n", "c</s>")
    stub = {"task_id": "x/0", "prompt": "def f():\n", "canonical_solution": " 1"}
    task = load(net, write_rows(tmp_path / "humaneval.jsonl", [stub] * 164))
    assert sizes(task) == [0, 0, 164]
    assert told(net, task, "test")[0] == ("def f():\n", " 1</s>")
    require_examples(task, "test")
    fails('task "humaneval" has 0 train and 0 val examples', require_examples, task, "train", "val")
    assert sizes(load(net, tmp_path / "humaneval", limit=7)) == [0, 0, 7]


def test_a_chat_is_learnt_from_its_last_answer_on(chat, tmp_path):
    talk = [("system", "x"), ("user", "a?"), ("assistant", "b"), ("user", "c?")]
    asked = "".join(f"<{role}>{said}</s>|" for role, said in talk) + "<assistant>"
    talk = [*talk, ("assistant", "\n  d")]
    told_as = [{"role": role, "content": said} for role, said in talk]
    task = load(chat, write_rows(tmp_path / "t.jsonl", [{"messages": told_as}] * 4), max_length=64)
    assert told(chat, task, "test") == [(asked, "\n  d</s>")]
    batch = task.batch("test", torch.tensor([0]))
    assert (batch["labels"] != IGNORED).sum() == len("\n  d") + 1
    assert batch["labels"][0, -1] == chat.inputs.tokenizer.eos_token_id
    plain = load(chat, tmp_path / "t.jsonl", template="plain")
    assert told(chat, plain, "test") == [("x\na?\nb\nc?\n", "\n  d</s>")]
    one = load(chat, write_rows(tmp_path / "s.jsonl", rows(4)), **ASKED)
    assert told(chat, one)[0] == ("<user>0 and 1?</s>|<assistant>", "it is 1</s>")


def test_what_is_left_out_and_cut_is_counted(net, tmp_path, caplog):
    long = [{"question": "q" * 80, "answer": "a"}, {"question": "q", "answer": "a" * 80}]
    file = write_rows(tmp_path / "t.jsonl", [*rows(10), *long, {"question": "q", "answer": " "}])
    task = load(net, file, **ASKED)
    assert sum(sizes(task)) == 11
    assert max(int(task.lengths(split).max()) for split in SPLITS) == 64
    for what in ("11 kept", "1 with a cut answer", "1 too long for 64", "1 without an answer"):
        assert what in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load(net, write_rows(tmp_path / "u.jsonl", rows(10)), **ASKED)
    assert [record.levelname for record in caplog.records][-1] == "INFO"


def test_groups_are_the_values_of_a_column(net, tmp_path):
    some = [row | {"author": "xyz"[i % 3]} for i, row in enumerate(rows(60))]
    task = load(net, write_rows(tmp_path / "t.jsonl", some), groups="author", **ASKED)
    for split in SPLITS:
        first = [int(asked.split()[0]) for asked, _ in told(net, task, split)]
        assert task.groups(split).tolist() == [i % 3 for i in first]


def reference(net: Net, asked: list[int], answer: list[int]) -> Tensor:
    """log p of each token of the answer, one forward pass a token, float64."""
    module = net.module.double()
    found = []
    for i, token in enumerate(answer):
        ids = torch.tensor([[*asked, *answer[:i]]])
        found.append(module(ids).logits[0, -1].log_softmax(0)[token])
    return torch.stack(found)


@torch.no_grad()
def test_loss_and_score_are_those_of_a_loop_over_the_answers_tokens(net, tmp_path):
    task = load(net, write_rows(tmp_path / "t.jsonl", rows(40)), **ASKED)
    own, ids = task.splits["train"], torch.tensor([5, 0, 30, 12])
    batch = task.batch("train", ids)
    assert batch["input_ids"].shape[1] == max(len(own.ids[i]) for i in ids)
    sums, weights = task.loss(net, batch)
    scores = task.score(net, batch)
    for row, i in enumerate(ids.tolist()):
        tokens, start = own.ids[i].tolist(), int(own.starts[i])
        logs = reference(net, tokens[:start], tokens[start:])
        assert weights[row] == len(logs) == len(told(net, task)[i][1]) - len("</s>") + 1
        torch.testing.assert_close(sums[row].double(), -logs.sum(), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(scores[row].double(), logs.mean(), atol=1e-5, rtol=1e-5)
    net.module.float()
    net.flat.fill_(float("nan"))
    assert task.score(net, batch).tolist() == [WORST] * 4


@torch.no_grad()
def test_the_likeliest_choice_wins(net, tmp_path):
    words = ["red", "green", "a deep blue"]
    some = [{"prompt": f"colour {i}?", "choices": words, "response": i % 3} for i in range(30)]
    file = write_rows(tmp_path / "t.jsonl", some)
    task = load(net, file, score="choice")
    assert (task.metric, task.ratio_scaled) == ("accuracy", True)
    named = [row | {"response": words[int(row["response"])]} for row in some]
    same = load(net, write_rows(tmp_path / "named" / "t.jsonl", named), score="choice")
    assert told(net, same) == told(net, task)
    found = task.score(net, task.batch("train", torch.arange(20)))
    encode, expected = net.inputs.tokenizer.encode, []
    for asked, answer in told(net, task)[:20]:
        given = encode(asked, add_special_tokens=False)
        ends = [f"{word}</s>" for word in words]
        logs = [reference(net, given, encode(e, add_special_tokens=False)).sum() for e in ends]
        expected.append(float(ends[int(torch.stack(logs).argmax())] == answer))
    assert found.tolist() == expected
    assert 0 < sum(expected) < 20


BAD = {
    'has no column "prompt".*--prompt': {},
    'row 17 of ".*sums.jsonl" has no "hint"': {"prompt": "{question}{hint}"},
    'has no column "hunt".*"hint".*--prompt': {"prompt": "{question}{hunt}"},
    'prompt "{question" is no template': {"prompt": "{question"},
    "no chat template; give --template plain": {"template": "chat"},
    "max_length 65 is more than the model takes, 64": {"max_length": 65},
    "max_new_tokens 64 leaves no room .* 64": {"score": "exact", "max_new_tokens": 64},
    "no example to learn from .*; 40 too long for 9 tokens": {"max_length": 9},
    "no example to learn from .*; 40 without an answer": {"response": "none"},
    'no column "choices".*--choices': {"score": "choice"},
    "row 0 of .* is no example: 'it is 1' is not in list": {"score": "choice", "choices": "list"},
    "allow that with --allow-code-execution": {"score": "pass@1"},
    "pass@1 needs a program": {"score": "pass@1", "allow_code_execution": True},
    'no column "instruction_id_list"': {"score": "ifeval", "max_new_tokens": 9},
    'no column "author".*--groups': {"groups": "author"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_and_rows_are_one_line(message, net, tmp_path):
    some = rows(40, hint="h", none="", list=["no"])
    del some[17]["hint"]
    file = write_rows(tmp_path / "sums.jsonl", some)
    settings = (ASKED if BAD[message] else {}) | BAD[message]
    fails(message, load, net, file, **settings)


def test_bad_files_are_one_line(net, chat, tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"a": 1}\n{"a')
    fails('torn.jsonl" cannot be read', load, net, tmp_path / "torn.jsonl")
    write_rows(tmp_path / "only" / "val.jsonl", rows(3))
    fails("has neither a train nor a test split", load, net, tmp_path / "only", **ASKED)
    mixed = [{"messages": [{"role": "user", "text": "a"}]}]
    fails("row 0 of .* is no example: 'content'", load, net, write_rows(tmp_path / "m.json", mixed))
    fails("is no folder|there is no folder", load, net, tmp_path / "nowhere" / "x")
    fails('no data "gsm9k".*did you mean "gsm8k"', load, net, "gsm9k")
    fails(r'"hub:openai/gsm8k:main" cannot be read.*--data-dir', load, net, "gsm8k")
    write_rows(tmp_path / "text" / "train.jsonl", rows(3))
    for data in ("gsm8k", tmp_path / "text"):
        fails("holds text, and the model takes images", load_task, str(data), ImageInput(8))
    chat.inputs.tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    fails(
        "row 0 of .*: no system here", load, chat, write_rows(tmp_path / "s.json", rows(9)), **ASKED
    )


@pytest.mark.realdata
def test_answers_are_masked_as_the_chat_template_of_a_real_model_says(realdata, smollm2):
    """Token by token: everything up to the last turn's header is not learnt, nor what follows <|im_end|>."""
    net = load_net(smollm2)
    task = load(net, realdata / "text" / "gsm8k")
    assert sizes(task) == [7099, 374, 1319]
    tokenizer = net.inputs.tokenizer
    first = json.loads((realdata / "text" / "gsm8k_test.jsonl").read_text().splitlines()[0])
    talk = [
        {"role": "user", "content": first["question"]},
        {"role": "assistant", "content": first["answer"]},
    ]
    every = tokenizer(tokenizer.apply_chat_template(talk, tokenize=False)).input_ids
    batch = task.batch("test", torch.tensor([0]))
    header = tokenizer("<|im_start|>assistant\n").input_ids
    place = next(i for i in range(len(every)) if every[i : i + len(header)] == header)
    learnt = every[place + len(header) :]
    assert tokenizer.decode(learnt[-2:]) == "<|im_end|>\n"
    labels = [IGNORED] * (place + len(header)) + learnt[:-1]
    assert batch["labels"][0].tolist() == labels
    assert batch["input_ids"][0].tolist() == every[:-1]
