"""Master weights on several ranks, which are processes that gloo joins, and distributed checkpoints."""

import re

import pytest
import torch
from conftest import torchrun
from test_masters_in_frameworks import OPTIMIZERS, WITH, WITHOUT, bits, load, steps_and_wrong

pytestmark = pytest.mark.once


@pytest.fixture
def ranks(application):
    """The application, from a process that has imported FSDP."""
    return application("master_weights", "ranks.py", heavy=True)


def digests(run):
    return re.findall(r"^WEIGHTS (\w+)$", run.out, re.MULTILINE)


def check_same(one, other):
    """The whole weights and states of two runs, whatever the ranks held."""
    assert bits(one["weights"]) == bits(other["weights"])
    assert one["states"]
    assert bits(one["states"]) == bits(other["states"])


def check_kept(result):
    states = result["states"].values()
    assert all(entry["exp_avg"].dtype is torch.float32 for entry in states)
    kept = torch.cat([entry["master_low_bits"].flatten() for entry in states])
    assert kept.view(torch.int16).ne(0).double().mean() > 0.5


@pytest.mark.parametrize("way", ["ddp", "zero"])
def test_replicas_stay_equal(ranks, way):
    """Each rank's weights are the same bits, and those of copies kept by hand; ZeroRedundancyOptimizer acts once a step."""
    run = ranks(*WITH, f"way={way}", ranks=2)
    assert steps_and_wrong(run) == [(6, 0), (6, 0)]
    assert len(set(digests(run))) == 1
    check_kept(load(ranks))
    assert {int(entry["step"]) for entry in load(ranks)["states"].values()} == {6}


def test_started_by_torchrun(ranks):
    run = ranks(*WITH, "way=ddp", "steps=2", python=torchrun(2))
    assert steps_and_wrong(run) == [(2, 0), (2, 0)]
    assert len(digests(run)) == 2
    assert len(set(digests(run))) == 1


@pytest.mark.parametrize("optimizer", ["AdamW", "fused", "SGD"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero", "fsdp1", "fsdp1-orig"])
def test_two_ranks_step_as_one_process(ranks, way, optimizer):
    """On the same data, on whole parameters and on local shards."""
    chosen = [*WITH, *OPTIMIZERS[optimizer], "same_data=true", f"frozen={not way.startswith('fsdp1')}"]
    assert steps_and_wrong(ranks(*chosen, "way=alone", "result=alone.pt", ranks=1)) == [(6, 0)]
    assert steps_and_wrong(ranks(*chosen, f"way={way}", "result=two.pt", ranks=2)) == [(6, 0), (6, 0)]
    alone, two = load(ranks, "alone.pt"), load(ranks, "two.pt")
    assert bits(two["weights"]) == bits(alone["weights"])
    if way in ("ddp", "fsdp2"):
        assert bits(two["states"]) == bits(alone["states"])


def test_fsdp2_steps_whole_tensors(ranks):
    """Where elements depend on each other, as in Muon, the optimizer sees DTensors, as it does without master weights."""
    run = ranks(*WITH, *OPTIMIZERS["Muon"], "matrices=true", "way=fsdp2", ranks=2)
    assert steps_and_wrong(run) == [(6, 0), (6, 0)]


def test_states_of_fsdp2_are_dtensors(ranks):
    """So that torch's tools for checkpoints know which part of the whole a rank has."""
    ranks(*WITH, "way=fsdp2", ranks=2)
    assert set(load(ranks)["own"].values()) == {"DTensor"}
    assert "master_low_bits" in load(ranks)["own"]


@pytest.mark.parametrize("full", [[], ["full=true"]], ids=["sharded", "full"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_distributed_checkpoint_resumes_bit_for_bit(ranks, way, full):
    """Saved on two ranks; loaded on two, one and three, sharded or by full_state_dict and broadcast_from_rank0."""
    chosen = [*WITH, f"way={way}", *full, "same_data=true"]
    ranks(*chosen, "result=whole.pt", ranks=2)
    ranks(*chosen, "steps=3", "save=saved", "result=half.pt", ranks=2)
    half, whole = load(ranks, "half.pt"), load(ranks, "whole.pt")
    check_kept(half)
    for count in (2, 1):
        run = ranks(*chosen, "steps=3", "first=3", "resume=saved", ranks=count)
        assert steps_and_wrong(run) == [(3, 0)] * count
        check_same(load(ranks), whole)
    # Gradients of three ranks have a mean that bf16 rounds; so what was loaded is compared, and then each step.
    ranks(*chosen, "steps=0", "resume=saved", ranks=3)
    check_same(load(ranks), half)
    run = ranks(*chosen, "steps=3", "first=3", "resume=saved", ranks=3)
    assert steps_and_wrong(run) == [(3, 0)] * 3


@pytest.mark.parametrize("loading", [["full=true"], [], ["partial=true"]], ids=["full", "sharded", "partial"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_distributed_checkpoint_made_without_is_resumed_with(ranks, way, loading):
    """It has no low bits to be loaded, whether or not the application allows that keys are missing."""
    chosen = [f"way={way}", *loading]
    ranks(*WITHOUT, *chosen, "steps=3", "save=without", "result=without.pt", ranks=2)
    ranks(*WITH, *chosen, "steps=0", "resume=without", ranks=2)
    without, loaded = load(ranks, "without.pt"), load(ranks)
    assert bits(loaded["weights"]) == bits(without["weights"])
    for name, entry in without["states"].items():
        assert bits(loaded["states"][name]["exp_avg"]) == bits(entry["exp_avg"].float())
    run = ranks(*WITH, *chosen, "steps=3", "first=3", "resume=without", ranks=2)
    assert steps_and_wrong(run) == [(3, 0), (3, 0)]
    check_kept(load(ranks))


@pytest.mark.parametrize("full", [[], ["full=true"]], ids=["sharded", "full"])
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_distributed_checkpoint_made_with_is_resumed_without(ranks, way, full):
    """The states are bf16 again, and the weights those of the checkpoint."""
    chosen = [f"way={way}", *full]
    ranks(*WITH, *chosen, "steps=3", "save=with", "result=with.pt", ranks=2)
    ranks(*WITHOUT, *chosen, "steps=0", "resume=with", ranks=2)
    made, loaded = load(ranks, "with.pt"), load(ranks)
    assert bits(loaded["weights"]) == bits(made["weights"])
    for name, entry in made["states"].items():
        assert bits(loaded["states"][name]["exp_avg"]) == bits(entry["exp_avg"].bfloat16())
    assert len(steps_and_wrong(ranks(*WITHOUT, *chosen, "steps=3", "first=3", "resume=with", ranks=2))) == 2


def test_zero_redundancy_optimizer_resumes_bit_for_bit(ranks):
    """Consolidated on rank zero, and loaded by each rank."""
    chosen = [*WITH, "way=zero"]
    ranks(*chosen, "result=whole.pt", ranks=2)
    ranks(*chosen, "steps=3", "save=saved.pt", "result=half.pt", ranks=2)
    run = ranks(*chosen, "steps=3", "first=3", "resume=saved.pt", "result=resumed.pt", ranks=2)
    assert steps_and_wrong(run) == [(3, 0), (3, 0)]
    check_same(load(ranks, "resumed.pt"), load(ranks, "whole.pt"))


@pytest.mark.parametrize("way", ["fsdp1", "fsdp1-orig"])
def test_fsdp1_resumes_bit_for_bit(ranks, way):
    """By flat parameters and by original ones, on as many ranks."""
    chosen = [*WITH, f"way={way}", "frozen=false"]
    assert steps_and_wrong(ranks(*chosen, "result=whole.pt", ranks=2)) == [(6, 0), (6, 0)]
    ranks(*chosen, "steps=3", "save=saved", "result=half.pt", ranks=2)
    run = ranks(*chosen, "steps=3", "first=3", "resume=saved", "result=resumed.pt", ranks=2)
    assert steps_and_wrong(run) == [(3, 0), (3, 0)]
    check_same(load(ranks, "resumed.pt"), load(ranks, "whole.pt"))
