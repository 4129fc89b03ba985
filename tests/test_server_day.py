"""A few hundred steps of the server's day on each backend, and that it notices what may go wrong."""

import dataclasses

import numpy as np
import pytest
import server_models
from server_arrays import NumpyArrays, TorchArrays
from server_day import Day, WrongResultError, main, spend

import fa3

STEPS = 50  # of each model


@pytest.mark.parametrize("model", server_models.CPU_MODELS, ids=lambda model: model.name)
def test_on_the_cpu(model):
    day = spend(Day(NumpyArrays(1), model, server_models.ON_CPU, 1), STEPS)
    assert day.tally.served > 15 and day.tally.calls > 90 and day.tally.checked > 2000


@pytest.mark.gpu
@pytest.mark.parametrize("model", server_models.GPU_MODELS, ids=lambda model: model.name)
def test_on_the_gpu(torch, model):
    day = spend(Day(TorchArrays(1), model, server_models.ON_GPU, 1), STEPS)
    assert day.tally.calls > 90 and day.tally.graph_calls > 20 and day.tally.checked > 2000


def short_day(seed=3, model=server_models.CPU_MODELS[0], steps=20):
    return spend(Day(NumpyArrays(seed), model, server_models.ON_CPU, seed), steps)


def test_a_seed_says_everything():
    digests = [short_day(seed).digest.hexdigest() for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.gpu
def test_a_seed_says_everything_on_the_gpu(torch):
    digests = [spend(Day(TorchArrays(5), server_models.GPU_MODELS[1], server_models.ON_GPU, 5), 30).digest.hexdigest()
               for _ in range(2)]
    assert digests[0] == digests[1]


def test_a_full_pool_makes_sequences_wait_and_give_up():
    model = dataclasses.replace(server_models.CPU_MODELS[0], num_pages=6)
    day = short_day(model=model, steps=60)
    assert day.tally.waited and day.tally.evicted and day.pool.most_used == 6


def test_all_pages_come_back():
    day = short_day()
    for sequence in list(day.schedule.live):
        day.schedule.end(sequence)
    day.pool.poison()
    assert day.pool.pages_used == 0 and not day.pool.users.any() and not day.pool.strays()
    assert np.isnan(day.pool.k.astype(np.float32)).all() and np.isnan(day.pool.v.astype(np.float32)).all()


def wrong_value(q, k_cache, v_cache, out):
    out[..., -1] *= 1.05


def element_before_the_pool(q, k_cache, v_cache, out):
    np.lib.stride_tricks.as_strided(k_cache, (2,), (-2,))[1] = 1


def element_of_a_free_page(q, k_cache, v_cache, out):
    v_cache[np.isnan(v_cache.astype(np.float32)).nonzero()[0][-1], -1, 0, 0] = 1


def appended_row_is_off(q, k_cache, v_cache, out):
    k_cache[~np.isnan(k_cache.astype(np.float32))] += 2**-6


@pytest.mark.parametrize(("slip", "said"), [
    (wrong_value, "queries on .* keys: the error is"), (element_before_the_pool, "pool: 1 elements"),
    (element_of_a_free_page, "pool: [1-9]"), (appended_row_is_off, "pool: [0-9]+ elements")])
def test_slips_are_noticed(monkeypatch, slip, said):
    call = fa3.flash_attn_with_kvcache

    def slipped(q, k_cache, v_cache, **options):
        out, lse = call(q, k_cache, v_cache, **options)
        slip(q, k_cache, v_cache, out)
        return out, lse

    monkeypatch.setattr(fa3, "flash_attn_with_kvcache", slipped)
    with pytest.raises(WrongResultError, match=said):
        short_day()


@pytest.mark.parametrize("keyword", ["cache_seqlens", "page_table"])
def test_stale_rows_and_pages_are_noticed(monkeypatch, keyword):
    """A call that sees a row, or a page, more or less than it should."""
    call = fa3.flash_attn_with_kvcache

    def slipped(q, k_cache, v_cache, **options):
        if "k" not in options:
            array = options[keyword].copy()
            array[0] = array[0] + 1 if keyword == "cache_seqlens" else np.roll(array[0], 1)
            options[keyword] = array
        return call(q, k_cache, v_cache, **options)

    monkeypatch.setattr(fa3, "flash_attn_with_kvcache", slipped)
    with pytest.raises((WrongResultError, ValueError)):
        short_day()


def test_log(capsys, tmp_path):
    path = tmp_path / "log"
    assert main(["--steps", "40", "--log", str(path)]) == 0
    log = path.read_text()
    assert capsys.readouterr().out.startswith(log)
    first, *_, last = log.splitlines()
    assert first.startswith("A server's day: 40 steps, seed 0, CPU, NumPy, fa3 ")
    assert last.startswith("ok: 40 steps, ") and last.endswith("no element of a pool astray")
    assert log.count("\ndigest ") == len(server_models.CPU_MODELS)
