"""What a model wrote, judged."""

import json

import pytest
import torch

from checkpoint_files import fails
from deltafl.errors import DeltaflError
from deltafl.models import Net
from deltafl.tasks import load_task
from deltafl.tasks.ifeval import follows, instructions
from deltafl.tasks.judges import code, exact, final
from deltafl.tasks.recipe import DataRecipe
from deltafl.tasks.sandbox import check_confinement
from deltafl.training.step import scores
from tiny_models import tiny_llama

FINALS = {
    "She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18": "18",
    "#### 1,234": "1234",
    "#### -7.50": "-7.50",
    "#### $12 dollars": "12",
    "first 3, then 4. So 7.": "7",
    "It costs $1,250.75 in all": "1250.75",
    "half is .5": ".5",
    "18": "18",
    "none": "none",
    "": "",
    r"so \boxed{\frac{1}{2}} it is, of 9": r"\frac{1}{2}",
    r"\boxed{1} or rather \boxed{ \dfrac{3}{4} }": r"\frac{3}{4}",
    r"\boxed{\left( 2, \infty \right)}": r"(2,\infty)",
    r"\boxed{10\%}": "10",
    r"\boxed{\$1{,}000": "1000",
    r"\boxed{x^{2}+\{y\}}.": r"x^{2}+\{y\}",
}


def test_the_final_answer_of_a_text():
    assert {text: final(text) for text in FINALS} == FINALS


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("#### 18", "The answer is 18.00.", 1),
        ("#### 18", "18 apples and 2 pears", 0),
        ("#### 1000", "1,000", 1),
        ("#### 5", "no number", 0),
        (r"\boxed{\frac12}", r"thus $\boxed{\tfrac12}$", 1),
        (r"\boxed{\frac12}", "0.5", 0),
        (r"\boxed{42}", "it is 42", 1),
    ],
)
def test_exact_match_is_of_numbers_where_both_are(answer, text, value):
    assert exact(answer, text) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Here:\n```python\ndef f():\n    return 1\n```\nDone. ```x```",
            "def f():\n    return 1\n",
        ),
        ("```\nx = 1\n", "x = 1\n"),
        ("    return 1\n\n    # more\ndef g():\n    pass", "    return 1\n\n    # more\n"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("", ""),
    ],
)
def test_code_is_what_is_fenced_or_goes_on(text, expected):
    assert code(text) == expected


REPEAT = "Write a line. No more."
FOLLOWED = {
    "keywords:existence": ({"keywords": ["Two", "one"]}, "one two", "one"),
    "keywords:forbidden_words": ({"forbidden_words": ["can", "ride"]}, "canned", "I CAN"),
    "keywords:frequency": ({"keyword": "a", "frequency": 2, "relation": "at least"}, "bAa", "a"),
    "keywords:letter_frequency": (
        {"letter": "#", "let_frequency": 2, "let_relation": "less than"},
        "#",
        "# #",
    ),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "a b-c", "a b"),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"},
        'Dr. A. Smith said "no." He left at 5.30 p.m. today!',
        "One. Two? Three",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "a\n\n'So, it is",
        "a\n\nSoon",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[a] [b c]", "[a]"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "x\np. p.s more", "P.S. x"),
    "detectable_format:constrained_response": ({}, "My answer is no.", "My answer is no"),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1 x Day2 y",
        "Day 1 x day 2 y",
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n - b", "* a\n- b\n- c"),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        "*a* and **b**",
        "*a* and ** **",
    ),
    "detectable_format:title": ({}, "<<a song>>", "<< >>"),
    "combination:two_responses": ({}, "a ****** b", "a ****** a"),
    "combination:repeat_prompt": ({"prompt_to_repeat": REPEAT}, f" {REPEAT.upper()} a", "a"),
    "startend:end_checker": ({"end_phrase": "The end?"}, 'so. the END?" ', "The end? so"),
    "startend:quotation": ({}, ' "a" ', '"a'),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A WELL-KNOWN thing",
        "A Well-KNOWN thing",
    ),
    "change_case:english_capital": ({}, "ALL OF IT", "ALL oF IT"),
    "change_case:english_lowercase": ({}, "all of it", "all Of it"),
    "punctuation:no_comma": ({}, "a; b", "a, b"),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_instruction_is_followed_or_not(name):
    settings, good, bad = FOLLOWED[name]
    wanted = instructions([name], [{**settings, "of_another": None}])
    assert wanted is not None
    assert (follows(wanted, good), follows(wanted, bad), follows(wanted, " ")) == (1, 0, 0)


def test_one_instruction_not_followed_is_enough_and_bad_ones_are_one_line(parrot, tmp_path):
    both = instructions(["punctuation:no_comma", "startend:quotation"], [{}, None])
    assert both is not None
    assert [follows(both, text) for text in ('"a b"', '"a, b"', "a b")] == [1, 0, 0]
    assert instructions(["language:response_language"], [{"language": "de"}]) is None
    file, settings = tmp_path / "t.jsonl", {"keyword": "a", "frequency": 1, "relation": "about"}
    for name, given, message in (
        ("a:b", {"x": 1}, "'a:b'"),
        ("keywords:frequency", {"keyword": "a"}, "'relation'|'frequency'"),
        ("keywords:frequency", settings, "'about'"),
    ):
        row = {"prompt": "x", "instruction_id_list": [name], "kwargs": [given]}
        file.write_text(json.dumps(row))
        message = f"row 0 of .* is no example: .*{message}.*; correct it"
        fails(message, load, parrot, file, score="ifeval")


@pytest.mark.realdata
def test_every_instruction_of_the_published_prompts_can_be_checked(realdata):
    rows = map(json.loads, (realdata / "text" / "ifeval.jsonl").read_text().splitlines())
    found = [instructions(row["instruction_id_list"], row["kwargs"]) for row in rows]
    assert (len(found), sum(own is None for own in found)) == (541, 31)
    assert {name for own in found for name, _ in own or ()} == FOLLOWED.keys()


class Parrot(Net):
    """A model that writes what it is told to."""

    said = ""

    def write(self, prompts, most):
        encode = self.inputs.tokenizer.encode
        return [torch.tensor(encode(self.said, add_special_tokens=False)[:most])] * len(prompts)


@pytest.fixture
def parrot(tmp_path):
    net = tiny_llama(tmp_path / "llama")
    return Parrot(net.module, net.inputs)


def load(net, file, **settings):
    return load_task(DataRecipe.of(data=str(file), max_new_tokens=40, **settings), net.inputs)


def test_what_a_model_writes_is_judged_for_each_example_in_its_place(parrot, tmp_path):
    some = [{"prompt": "p" * (i % 7), "response": f"#### {i % 3}"} for i in range(100)]
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, some)))
    task = load(parrot, file, score="exact")
    assert (task.metric, task.ratio_scaled) == ("exact match", True)
    parrot.said = "so it is 2"
    decode = parrot.inputs.tokenizer.decode
    for split in ("train", "test"):
        expected = [float("#### 2" in decode(ids.long())) for ids in task.splits[split].ids]
        assert scores(parrot, task, split, batch_size=8).tolist() == expected
    parrot.check(task)
    loss, _ = task.loss(parrot, task.batch("train", torch.arange(3)))
    assert loss.requires_grad
    plain = Net(parrot.module, parrot.inputs)
    with pytest.raises(DeltaflError, match="exact match is for models that write"):
        scores(plain, task, "test")


def test_programs_that_pass_their_tests_count(parrot, tmp_path):
    try:
        check_confinement()
    except DeltaflError as error:
        pytest.skip(str(error))
    some = [{"prompt": f"{i}", "response": "x", "test": f"assert f() == {i % 2}"} for i in range(4)]
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, some)))
    settings = {"score": "pass@1", "allow_code_execution": True, "val_fraction": 0.25}
    task = load(parrot, file, program="{answer}\n{test}", **settings)
    assert task.metric == "pass@1"
    parrot.said = "```python\ndef f():\n  return 1\n```"
    found = {row["prompt"]: float(int(row["prompt"]) % 2) for row in some}
    for split in ("train", "val", "test"):
        own = task.splits[split]
        asked = [parrot.inputs.tokenizer.decode(ids[:1].long()) for ids in own.ids]
        assert scores(parrot, task, split).tolist() == [found[prompt] for prompt in asked]
