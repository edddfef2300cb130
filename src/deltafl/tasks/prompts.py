"""What is asked and what is answered: rows of a table as text, by the tokenizer's chat template or
plainly, and text as tokens.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from string import Formatter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from jinja2 import TemplateError

from deltafl.errors import DeltaflError, shorten
from deltafl.tasks.ifeval import instructions
from deltafl.tasks.inputs import TextInput
from deltafl.tasks.judges import JUDGES
from deltafl.tasks.lines import encoded
from deltafl.tasks.recipe import TextSource

if TYPE_CHECKING:
    from datasets import Dataset


class Example(NamedTuple):
    """A prompt, the answers to choose from, or the one, the number of the right one and whether it
    says something, the source, and what a text is judged by, None if it cannot be. Prompt and
    answer are all of a text: with BOS and EOS, or the marks of a chat.
    """

    prompt: str
    answers: Sequence[str]
    right: int
    says: bool
    source: str
    facts: Any


Kept: TypeAlias = tuple[list[int], int, str, Any]
"""Ids, the first position that is answer, source and facts."""


@dataclass(frozen=True)
class Prompts:
    """Examples of text: what they hold, and whose tokens they become, at most `most` in one and
    `room` in a prompt.
    """

    how: TextSource
    inputs: TextInput
    most: int
    room: int

    def examples(self, table: "Dataset", first: int, where: str) -> Iterator[Example]:
        """Those in the rows of a table, the first of which has the number `first`.

        Raises:
            DeltaflError: a column is missing, a row lacks a field or holds no such thing.
        """
        from deltafl.tasks.tables import present

        fields = _fields(self.how, table.column_names)
        columns = {
            present(table, setting, [name], where)
            for setting, spec in fields.items()
            for name in _columns(setting, spec, table.column_names)
        }
        for number, row in enumerate(table.select_columns(sorted(columns)).to_list(), first):
            place = f"row {number} of {where}"
            if absent := sorted(name for name in columns if row[name] is None):
                raise DeltaflError(f"{place} has no {shorten(absent)}; complete or remove it")
            try:
                yield self._example(row, fields)
            except (ValueError, TypeError, LookupError, TemplateError) as error:
                raise DeltaflError(f"{place} is no example: {error}; correct it") from error

    def _example(self, row: Mapping[str, Any], fields: Mapping[str, str]) -> Example:
        texts = {
            k: "\n".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in row.items()
        }

        def filled(key: str) -> str:
            spec = fields.get(key, "")
            return texts[spec] if spec in texts else spec.format_map(texts)

        asked, answer = [{"role": "user", "content": filled("prompt")}], filled("response")
        if "messages" in fields:
            asked = [{key: m[key] for key in ("role", "content")} for m in row[fields["messages"]]]
            answer = asked.pop()["content"] if asked[-1]["role"] == "assistant" else ""
        answers, right, facts = [answer], 0, answer
        match self.how.score:
            case "choice":
                answers, given = [*row[fields["choices"]]], row.get(fields.get("response", ""))
                right = given if isinstance(given, int) else answers.index(answer)
            case "pass@1":
                facts = fields["program"].format_map(texts | {"answer": "\0"}).split("\0")
            case "ifeval":
                facts = instructions(row["instruction_id_list"], row["kwargs"])
        says = bool(answers[right].strip())
        return Example(*self._rendered(asked, answers), right, says, filled("groups"), facts)

    def _rendered(
        self, asked: Sequence[dict[str, str]], answers: Sequence[str]
    ) -> tuple[str, list[str]]:
        """The prompt, and what follows it in the text with each answer."""
        tokenizer, end = self.inputs.tokenizer, str(self.inputs.tokenizer.eos_token or "")
        if self.how.template == "plain" or not tokenizer.chat_template:
            prompt = str(tokenizer.bos_token or "") + "\n".join(m["content"] for m in asked)
            return prompt + "\n" * (not prompt[-1:].isspace()), [own + end for own in answers]
        render = tokenizer.apply_chat_template
        replies = [[*asked, {"role": "assistant", "content": own}] for own in answers]
        prompt = str(render([*asked], tokenize=False, add_generation_prompt=True))
        wholes = [str(render(reply, tokenize=False)) for reply in replies]
        while not all(whole.startswith(prompt) for whole in wholes):
            prompt = prompt[:-1]
        rest = [whole[len(prompt) :] for whole in wholes]
        return prompt, [own[: own.rfind(end) + len(end)] if end in own else own for own in rest]

    def tokens(self, examples: Sequence[Example]) -> tuple[list[Kept], Counter[str]]:
        """Those of examples, and reasons for which some were left out or cut, with their number.
        Where the tokens of the prompt alone are not those of the whole, the answer's are made
        apart.
        """
        texts = [(example.prompt, own) for example in examples for own in example.answers]
        asked = encoded([prompt for prompt, _ in texts], self.inputs)
        whole = encoded([prompt + answer for prompt, answer in texts], self.inputs)
        pairs = (
            (len(a), w if w[: len(a)] == a else a + encoded([answer], self.inputs)[0])
            for a, w, (_, answer) in zip(asked, whole, texts, strict=True)
        )
        kept, counts, most = list[Kept](), Counter[str](), self.most
        for example in examples:
            choices = [*islice(pairs, len(example.answers))]
            start, ids = choices[example.right]
            facts, longest = example.facts, 0
            if self.how.score == "choice":
                facts, longest = [example.right, choices], max(len(own) for _, own in choices)
            if not example.says and self.how.score not in JUDGES:
                counts["without an answer"] += 1
            elif facts is None:
                counts["in a language that only lm-eval can tell"] += 1
            elif longest > most or start > self.room:
                counts[f"too long for {most} tokens"] += 1
            else:
                counts["with a cut answer"] += len(ids) > most
                kept.append((ids[:most], start, example.source, facts))
        return kept, counts


def _fields(how: TextSource, columns: Sequence[str]) -> dict[str, str]:
    """Setting -> the column, or template of columns, that an example needs."""
    said, names = how.resolved(), ["prompt", "response", "groups"]
    if how.messages or (how.prompt == "prompt" not in columns and "messages" in columns):
        said["messages"], names = how.messages or "messages", ["messages", "groups"]
    elif how.score == "ifeval":
        said["score"], names = "{instruction_id_list}{kwargs}", ["prompt", "groups", "score"]
    names += [name for s, name in (("choice", "choices"), ("pass@1", "program")) if s == how.score]
    return {name: said[name] for name in names if said[name]}


def _columns(setting: str, spec: str, known: Sequence[str]) -> list[str]:
    """Those that a column's name, or a template, names."""
    if spec in known or "{" not in spec:
        return [spec]
    try:
        names = [name for _, name, _, _ in Formatter().parse(spec) if name is not None]
    except ValueError as error:
        raise DeltaflError(f'{setting} "{spec}" is no template: {error}') from error
    return [name for name in names if (setting, name) != ("program", "answer")]
