"""Whether work finds a place on a cluster's nodes: arithmetic."""

from __future__ import annotations

from raysys.room import Need, left_over, missing, num_that_fit

GPU_NODE = {"CPU": 16.0, "GPU": 4.0, "memory": 64e9}
CPU_NODE = {"CPU": 32.0, "memory": 128e9}


def test_bundles_are_placed_whole_on_one_node() -> None:
    assert left_over([{"CPU": 3.0}] * 2, [{"CPU": 4.0}, {"CPU": 2.0}]) == [{"CPU": 3.0}]
    assert left_over([{"CPU": 3.0}] * 2, [{"CPU": 4.0}, {"CPU": 3.0}]) == []


def test_the_largest_is_placed_first() -> None:
    small, large = {"CPU": 1.0}, {"CPU": 4.0}
    assert left_over([small, large], [{"CPU": 4.0}, {"CPU": 1.0}]) == []


def test_a_gpu_takes_the_cpus_that_decode_for_it() -> None:
    """Two workers with 8 CPUs each fill a node of 16, though it has 4 GPUs."""
    assert num_that_fit([{"CPU": 8.0, "GPU": 1.0}], [GPU_NODE, CPU_NODE]) == 2
    assert num_that_fit([{"CPU": 4.0, "GPU": 1.0}], [GPU_NODE, CPU_NODE]) == 4


def test_tenths_of_a_cpu_add_up() -> None:
    assert num_that_fit([{"CPU": 0.1}], [{"CPU": 1.0}]) == 10
    assert num_that_fit([{"CPU": 0.9}, {"CPU": 0.01}], [{"CPU": 2.0}], beside=[{"CPU": 0.1}]) == 2


def test_nothing_fits_where_what_stands_beside_it_does_not() -> None:
    assert num_that_fit([{"CPU": 1.0}], [CPU_NODE], beside=[{"GPU": 1.0}]) == 0


def test_what_is_missing_is_said_with_both_numbers() -> None:
    need = Need("train with 3 workers", [{"CPU": 2.0, "GPU": 2.0}] * 3)
    assert missing(need, [GPU_NODE, GPU_NODE]) is None
    assert missing(need, [GPU_NODE, CPU_NODE]) == "train with 3 workers needs 6 GPUs, the cluster has 4"


def test_room_in_pieces_is_no_room() -> None:
    need = Need("train with 2 workers", [{"CPU": 3.0}] * 2)
    said = missing(need, [{"CPU": 4.0}, {"CPU": 2.0}])
    assert said == (
        "train with 2 workers needs 3 CPUs on one node, 2 times; the cluster's nodes have room for 1, the largest has 4 CPUs"
    )


def test_memory_counts_on_each_node() -> None:
    need = Need("train with 2 workers", [{"CPU": 1.0, "memory": 100e9}] * 2)
    assert missing(need, [CPU_NODE, CPU_NODE]) is None
    assert "needs 1 CPUs, 100 GB of memory on one node, 2 times" in str(missing(need, [CPU_NODE, GPU_NODE]))


def test_a_share_of_a_gpu_lies_on_one_device() -> None:
    """Two of .4 on each of two devices; the fifth would need parts of both."""
    assert left_over([{"GPU": 0.4}] * 5, [{"GPU": 2.0}]) == [{"GPU": 0.4}]
    assert num_that_fit([{"GPU": 0.5}], [{"GPU": 1.5}]) == 3
    assert num_that_fit([{"GPU": 2.0}], [{"GPU": 3.5}]) == 1


def test_an_evaluator_does_not_take_the_node_that_a_worker_needs() -> None:
    worker, evaluator = {"CPU": 2.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 0.5}
    assert left_over([worker, evaluator], [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 4.0}]) == []


def test_what_needs_no_gpu_goes_where_none_is() -> None:
    assert num_that_fit([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0}], beside=[{"CPU": 1.0}]) == 1
