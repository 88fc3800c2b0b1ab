"""Parallel training on CPU: one warning for all ranks, and numbers that say of what they are."""

import importlib.util
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, environments_of_ranks, torchrun
from words import LOST, SUPPLIED, UNSEEN, storage_set, trained

ELEMENTS = 64 * 64 + 64 + 64 + 64 + 64 * 10 + 10
WAYS = ["ddp", "fsdp2", "fsdp2-bf16", "fsdp1", "fsdp1-orig"]


@pytest.fixture
def parallel(application):
    """The application ``parallel``, started as so many forks, or by ``torchrun`` as so many fresh interpreters."""

    def run(way, *arguments, ranks=2, by_torchrun=False, status=0):
        start = {"python": torchrun(ranks)} if by_torchrun else {"ranks": ranks}
        return application("parallel", heavy=True)(f"way={way}", *arguments, status=status, **start)

    return run


@pytest.mark.once
@pytest.mark.parametrize(
    ("way", "ranks", "by_torchrun"),
    [
        ("ddp", 2, True),
        ("ddp", 4, False),
        ("fsdp2", 2, True),
        ("fsdp2", 4, False),
        ("fsdp2-bf16", 2, False),
        ("fsdp1", 2, True),
        ("fsdp1-orig", 2, False),
    ],
)
def test_bf16_storage(parallel, way, ranks, by_torchrun):
    """One warning between two lines; the counts are of the whole model, or say that they are not."""
    run = parallel(way, "+precision_policy=on", "model.torch_dtype=bfloat16", ranks=ranks, by_torchrun=by_torchrun)
    assert run.levels == ["INFO", "WARNING", "INFO"]
    if way == "fsdp1-orig":
        assert f"({ELEMENTS // 2:,} elements, of this rank's shard)" in run.out
    else:
        assert f"({ELEMENTS:,} elements)" in run.out
    assert ("from this rank's shard" in run.out) is (way != "ddp")
    assert ("fp32 storage adds on each rank" in run.out) is (way != "ddp")


SHARDED = [
    "+precision_policy=on",
    "optimizer._target_=torch.distributed.optim.ZeroRedundancyOptimizer",
    "+optimizer.optimizer_class={_target_:hydra.utils.get_class,path:torch.optim.AdamW}",
]


@pytest.mark.once
def test_zero_redundancy_optimizer_over_bf16(parallel):
    """Judged by what it shards: the AdamW inside, which has this rank's parameters alone."""
    run = parallel("ddp", *SHARDED, "model.torch_dtype=bfloat16")
    assert run.levels == ["INFO", "WARNING", "INFO"]
    assert f"WARNING precision_policy=on: {LOST}" in run.log


@pytest.mark.once
def test_zero_redundancy_optimizer_is_known(parallel):
    """Composition sees the AdamW inside as well, and sets fp32."""
    run = parallel("ddp", *SHARDED)
    assert storage_set("model.torch_dtype", "auto") + ": torch.optim.AdamW keeps no fp32 master copy" in run.log
    assert "WARNING" not in run.log


def trained_by(way: str, computed: str) -> str:
    """What the line of the first step says: FSDP1 makes one tensor of all, or gives each rank its part of each."""
    shard = way == "fsdp1-orig"
    return trained(1 if way == "fsdp1" else 6, ELEMENTS // 2 if shard else ELEMENTS, computed, shard)


@pytest.mark.once
@pytest.mark.parametrize("way", WAYS)
def test_fp32_storage(parallel, way):
    """What the policy set stays fp32 in the optimizer's hands, a bf16 MixedPrecisionPolicy included: silence."""
    run = parallel(way, "+precision_policy=on")
    assert run.levels == ["INFO", "INFO"]
    computed = {"fsdp2-bf16": "computed in bf16 by FSDP's mixed precision"}.get(way, UNSEEN)
    assert run.log.endswith(trained_by(way, computed))


@pytest.mark.once
@pytest.mark.parametrize("way", WAYS)
def test_mixed(parallel, way):
    """bf16 inside and fp32 outside under each of them; where FSDP casts by itself, that is said and nothing is added."""
    run = parallel(way, "+precision_policy=mixed")
    assert f"INSIDE {[torch.bfloat16] * (3 if way == 'ddp' else 2)}" in run.out
    assert run.levels == ["INFO", "INFO"]
    computed = {
        "ddp": f"computed in bf16 by {SUPPLIED}",
        "fsdp2-bf16": "computed in bf16 by FSDP's mixed precision",
    }
    assert run.log.endswith(trained_by(way, computed.get(way, f"called under {SUPPLIED}")))
    assert f"OUTSIDE torch.{'bfloat16' if way == 'fsdp2-bf16' else 'float32'}" in run.out


@pytest.mark.once
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_strict_ends_all_ranks(parallel, way):
    """None hangs, though none is stopped because the other failed: each rank sees its own bf16 parameters."""
    run = parallel(way, "+precision_policy=strict", "model.torch_dtype=bfloat16", status=1)
    assert run.statuses == [1, 1]
    assert run.err.count("Bf16AdamError: ") == 2


@pytest.mark.once
def test_strict_ends_torchrun(parallel):
    """The launcher sees that the job has failed."""
    run = parallel("ddp", "+precision_policy=strict", "model.torch_dtype=bfloat16", by_torchrun=True, status=1)
    assert "Bf16AdamError: " in run.err
    assert "ChildFailedError" in run.err


@pytest.mark.once
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
@pytest.mark.parametrize("parent_first", [False, True])
def test_processes_that_the_job_starts(application, method, parent_first):
    """They are watched as the job is: rank zero among them speaks, unless the job itself has said it."""
    words = ["+precision_policy=on", "model.torch_dtype=bfloat16", f"method={method}", f"parent_first={parent_first}"]
    run = application("started_processes")(*words)
    assert (run.out + run.err).count("over bf16 weights") == 1
    assert ("over bf16 weights" in run.out) is (parent_first or method == "fork")  # a fresh process has no log of Hydra's


def test_strict_in_a_process_that_the_job_starts(application):
    """The error stops it, and the job with it."""
    run = application("started_processes")("+precision_policy=strict", "model.torch_dtype=bfloat16", status=1)
    assert "Bf16AdamError" in run.err


def test_a_worker_without_torch_is_not_made_to_import_it(application):
    """A pool that prepares data pays nothing for the watch, which is armed: the policy has imported torch in the job."""
    run = application("light_workers")("+precision_policy=on", python=sys.executable)
    assert "job True" in run.out
    assert "spawn False" in run.out
    assert "forkserver False" in run.out


@pytest.mark.once
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("policy", ["off", "on", "mixed", "strict", "insists on bf16"])
def test_the_benchmark_of_ranks(tmp_path, heavy_starter, checkpoint, way, policy):
    """What it asserts on GPUs holds with gloo on a CPU as well: one voice, whole counts, shares, dtypes, nobody hangs."""
    from precision_policy.estimate.checkpoint import summarize

    spec = importlib.util.spec_from_file_location("ranks_benchmark", ROOT / "benchmarks/ranks.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    histograms = summarize(checkpoint).histograms.values()
    total = sum(histogram.total for histogram in histograms)
    share = 100 * sum(histogram.lost(1e-5) * histogram.total for histogram in histograms) / total
    small = ["batch=2", "length=64", "steps=3", "optimizer.fused=null", "hydra.run.dir=out"]
    words = [f"model.pretrained_model_name_or_path={checkpoint}", f"parallel={way}", *small, *benchmark.POLICIES[policy]]
    application = ROOT / "benchmarks/llama_app.py"
    statuses = heavy_starter.run(application, words, tmp_path, environments_of_ranks(ENVIRONMENT, 2), 120)
    outputs = [(tmp_path / f".stdout.{rank}").read_text() + (tmp_path / f".stderr.{rank}").read_text() for rank in (0, 1)]
    row = benchmark.row(way, policy, list(zip(statuses, outputs, strict=True)), share)
    assert row["ranks"] == 2
    assert policy == "off" or row["told"]
