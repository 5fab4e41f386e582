"""Every family computes what transformers computes, whichever way its tokens are cut into steps."""

import itertools
import json

import pytest
import torch
import transformers
import zoo
from zoo import LENGTHS, Paged, chunk, difference, prompt

from plait.engine.checkpoint import open_checkpoint
from plait.engine.decoder import Decoder
from plait.engine.loader import load_weights
from plait.model import read_spec

# Both run in float32 and sum in different orders; what we see is 1e-5, and a wrong term is 1e-3 and more.
TOLERANCE = 1e-4


def test_prefill_gives_the_logits_of_transformers(tiny):
    paged = Paged(tiny.decoder)
    for length in LENGTHS:
        ids = prompt(length)
        ours = paged.run(chunk(ids, 0, length, paged.table(length)))
        assert ours.dtype == torch.float32 and ours.shape == (length, zoo.VOCAB)
        assert difference(ours, tiny.reference_logits(ids)) < TOLERANCE


def test_decoding_token_by_token_gives_the_same_logits(tiny):
    ids = prompt(40)
    paged = Paged(tiny.decoder)
    table = paged.table(len(ids))
    ours = torch.cat([paged.run(chunk(ids, position, position + 1, table)) for position in range(len(ids))])
    assert difference(ours, tiny.reference_logits(ids)) < TOLERANCE


def test_a_ragged_batch_of_prefills_and_decodes_gives_the_same_logits(tiny):
    prompts = [prompt(length) for length in LENGTHS]
    paged = Paged(tiny.decoder)
    tables = [paged.table(len(ids)) for ids in prompts]
    last = len(prompts) - 1
    # Three sequences are near their ends and the longest is in the middle of its prompt.
    starts = [len(ids) - 3 for ids in prompts[:-1]] + [61]
    for ids, table, start in zip(prompts, tables, starts, strict=True):
        paged.run(chunk(ids, 0, start, table, rows=0))
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    for step in range(3):
        stops = [start + step + 1 for start in starts[:-1]] + [61 + 29 * (step + 1) + (step == 2) * 2]
        begins = [stop - 1 for stop in stops[:-1]] + [61 + 29 * step]
        # The long chunk comes second in the batch: results are in the caller's order.
        order = [0, last, *range(1, last)]
        step_rows = paged.run(*(chunk(prompts[i], begins[i], stops[i], tables[i]) for i in order))
        for i, part in zip(order, step_rows.split([stops[i] - begins[i] for i in order]), strict=True):
            rows[i].append(part)
    for ids, start, parts in zip(prompts, starts, rows, strict=True):
        ours = torch.cat(parts)
        assert difference(ours, tiny.reference_logits(ids)[start : start + len(ours)]) < TOLERANCE


def test_chunked_prefill_gives_the_same_logits(tiny):
    ids = prompt(150)
    paged = Paged(tiny.decoder)
    table = paged.table(len(ids))
    bounds = [0, 7, 8, 23, 32, 75, 96, 150]  # chunks of one token, across pages, windows and attention chunks
    ours = torch.cat(
        [paged.run(chunk(ids, start, stop, table)) for start, stop in itertools.pairwise(bounds)]
    )
    assert difference(ours, tiny.reference_logits(ids)) < TOLERANCE


def test_a_prompt_that_starts_on_the_cached_blocks_of_another_gives_the_same_logits(tiny):
    shared = prompt(48)
    ids = shared + prompt(17, seed=11)
    paged = Paged(tiny.decoder)
    first = paged.table(len(shared))
    paged.run(chunk(shared, 0, 48, first, longest=len(ids)))
    second = first + paged.table(17)
    ours = paged.run(chunk(ids, 48, 65, second))
    assert difference(ours, tiny.reference_logits(ids)[48:]) < TOLERANCE


def test_sixty_four_greedy_tokens_are_those_of_transformers(tiny):
    # Transformers changes dynamic frequencies under a cache that holds the old ones: stay below its limit.
    ids = prompt(40 if "dynamic" in tiny.name else 80)
    tiny.reference.generation_config.eos_token_id = None
    theirs = tiny.reference.generate(
        torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=0, use_cache=True
    )[0, len(ids) :].tolist()
    paged = Paged(tiny.decoder)
    longest = len(ids) + 64
    table = paged.table(longest)
    known = list(ids)
    logits = paged.run(chunk(known, 0, len(known), table, rows=1, longest=longest))
    for _ in range(63):
        known.append(int(logits[-1].argmax()))
        logits = paged.run(chunk(known, len(known) - 1, len(known), table, rows=1, longest=longest))
    known.append(int(logits[-1].argmax()))
    assert known[len(ids) :] == theirs


def test_two_spans_chained_equal_the_whole_bit_for_bit(tiny):
    checkpoint, whole = tiny.checkpoint, Paged(tiny.decoder)
    cut = len(checkpoint.spec.blocks) // 2
    spans = [
        Paged(zoo.decoder_of(checkpoint, blocks=blocks))
        for blocks in (range(cut), range(cut, block_count(tiny)))
    ]
    prompts = [prompt(5), prompt(40), prompt(23)]
    tables = [whole.table(len(ids)) for ids in prompts]
    # A step of prefills, and one that mixes a prefill between decodes.
    for bounds in (((0, 4), (0, 30), (0, 22)), ((4, 5), (30, 40), (22, 23))):
        chunks = [
            chunk(ids, *bound, table) for ids, bound, table in zip(prompts, bounds, tables, strict=True)
        ]
        hidden = spans[0].run(*chunks)
        assert hidden.shape == (sum(stop - start for start, stop in bounds), checkpoint.spec.hidden)
        assert torch.equal(spans[1].run(*chunks, hidden=hidden), whole.run(*chunks))


def block_count(tiny) -> int:
    return len(tiny.checkpoint.spec.blocks)


def test_the_old_dialect_of_its_config_means_the_same_model(tiny, tmp_path):
    new = json.loads((tiny.folder / "config.json").read_text())
    old = zoo.in_old_dialect(new)
    assert not {"rope_parameters", "layer_types", "dtype"} & set(old)
    assert read_spec(old, "old") == read_spec(new, "new")
    # The old file is one that transformers reads as the same model.
    (tmp_path / "config.json").write_text(json.dumps(old))
    reread = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    rope = reread.get("rope_parameters")
    assert reread.get("layer_types") == new.get("layer_types")
    if rope and "type" in rope:
        del rope["type"]
    assert rope == new.get("rope_parameters")


def test_bfloat16_agrees_with_transformers_on_nearly_every_token(tiny):
    ids = prompt(150)
    paged = Paged(zoo.decoder_of(tiny.checkpoint, torch.bfloat16), dtype=torch.bfloat16)
    ours = paged.run(chunk(ids, 0, len(ids), paged.table(len(ids))))
    theirs = tiny.reference_logits(ids)
    # Random weights have no confident tokens: bfloat16 moves a few argmaxes whoever computes it, by as much as
    # transformers' own bfloat16 run does.
    half = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.folder, dtype=torch.bfloat16, attn_implementation=tiny.reference.config._attn_implementation
    )
    with torch.no_grad():
        their_half = half(torch.tensor([ids])).logits[0].float()
    their_error = (their_half - theirs).double().pow(2).mean().sqrt()
    our_error = (ours - theirs).double().pow(2).mean().sqrt()
    assert our_error < 1.3 * their_error


def test_a_nested_multimodal_checkpoint_is_its_text_model(tiny_checkpoints, tmp_path):
    text = tiny_checkpoints("gemma3")
    zoo.nest_as_multimodal(text.folder, tmp_path / "nested")
    nested = open_checkpoint(tmp_path / "nested")
    ids = prompt(40)
    paged = Paged(zoo.decoder_of(nested))
    ours = paged.run(chunk(ids, 0, len(ids), paged.table(len(ids))))
    assert difference(ours, text.reference_logits(ids)) < TOLERANCE


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2_greedy", "deepseek_v3"])
def test_absorbed_latent_attention_equals_the_expanded_one(name, tiny_checkpoints):
    tiny = tiny_checkpoints(name)
    spec = tiny.checkpoint.spec
    weights = load_weights(tiny.checkpoint, None, torch.float64, "cpu")
    paged = Paged(Decoder(spec, weights, device="cpu", dtype=torch.float64), dtype=torch.float64)
    ids = prompt(40)
    expanded_table, absorbed_table = paged.table(len(ids)), paged.table(len(ids))
    expanded = paged.run(chunk(ids, 0, len(ids), expanded_table))
    absorbed = torch.cat([paged.run(chunk(ids, at, at + 1, absorbed_table)) for at in range(len(ids))])
    assert difference(absorbed, expanded) < 1e-5


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "llama", "gpt2"])
def test_cache_bytes_are_those_of_the_formula(name, tiny_checkpoints):
    tiny = tiny_checkpoints(name)
    attention = tiny.checkpoint.spec.blocks[0].attention
    if attention.latent:
        per_token = attention.latent.kv_rank + attention.latent.rope_dim
    else:
        per_token = 2 * attention.kv_heads * attention.head_dim
    store = Paged(tiny.decoder).store
    assert store.extent_bytes == zoo.BLOCK_TOKENS * block_count(tiny) * per_token * 4
