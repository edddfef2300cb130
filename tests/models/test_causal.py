"""What a causal language model writes, against greedy choice token by token."""

import json

import pytest
import torch
from torch import Tensor

from deltafl.models import Net, load_net
from deltafl.models.causal import CausalNet
from tiny_models import saved, tiny_llama

MOST = 12


@torch.no_grad()
def greedy(net: Net, prompt: Tensor, most: int, stops: set[int]) -> list[int]:
    """The likeliest token again and again, without a cache and alone."""
    ids = prompt.tolist()
    for _ in range(most):
        best = int(net.module(torch.tensor([ids])).logits[0, -1].argmax())
        if best in stops:
            break
        ids.append(best)
    return ids[len(prompt) :]


@pytest.fixture
def net(tmp_path):
    made = tiny_llama(tmp_path / "llama")
    for parameter in made.module.parameters():  # small weights repeat one token
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(2))
    assert isinstance(made, CausalNet)
    return made


def test_a_batch_is_written_greedily_as_each_prompt_alone(net, tmp_path):
    eos, generator = net.inputs.tokenizer.eos_token_id, torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 259, (n,), generator=generator) for n in (1, 9, 4, 20)]
    net.module.train()
    written = net.write(prompts, MOST)
    assert not net.module.training
    assert net.module.config.use_cache is False
    expected = [greedy(net, prompt, MOST, {eos}) for prompt in prompts]
    assert [ids.tolist() for ids in written] == expected
    assert [ids.tolist() for ids in net.write(prompts, 1)] == [ids[:1] for ids in expected]
    # Of two ends each stops, and what both say of it is left out.
    stop = expected[1][5]
    folder = saved(net, tmp_path / "saved")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [stop, 380]}))
    again = load_net(folder)
    assert isinstance(again, CausalNet)
    shorter = [greedy(net, prompt, MOST, {eos, stop}) for prompt in prompts]
    assert [ids.tolist() for ids in again.write(prompts, MOST)] == shorter
    assert len(shorter[1]) <= 5
    assert isinstance(net.sharing(), CausalNet)


@pytest.mark.realdata
def test_a_real_model_writes_the_end_of_its_turn(smollm2):
    net = load_net(smollm2)
    assert isinstance(net, CausalNet)
    tokenizer = net.inputs.tokenizer
    asked = ["What is the capital of France?", "Say hello."]
    chats = [[{"role": "user", "content": text}] for text in asked]
    texts = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
    ]
    prompts = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    written = net.write(prompts, 40)
    assert tokenizer.decode(written[0]) == "The capital of France is Paris."
