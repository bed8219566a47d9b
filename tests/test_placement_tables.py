"""Golden tables: four runs on four clusters, every row of a GPU worked by hand.

In all of them a context of CUDA (`ASSUMED.context`) a process is on the card, and vLLM's graphs
(`ASSUMED.graphs`) while it sleeps.
"""

from __future__ import annotations

from placements import LLAMA_70B, LORA, QLORA_A100, QLORA_T4, QWEN_7B, at, planned, preset, sizes

from launch.cluster_fit import refusal
from launch.cluster_text import describe
from launch.machines import GIB
from launch.memory_parts import ASSUMED


def test_7b_qlora_on_a_t4() -> None:
    """One process with everything. Qwen2.5-7B: 28 layers, hidden 3584, inner 18944, 28 heads and 4
    key heads of 128, 152,064 words.

    Linear weights: a layer has q, o 2 x 3584 x 3584, k, v 2 x 3584 x 512, MLP 3 x 3584 x 18944:
    233,046,016, x 28 = 6,525,288,448 at 0.515869140625 B (NF4, double quantisation); the other
    1,090,328,064 at 2 B: 3,366,194,944 + 2,180,656,128 = 5,546,851,072.
    Adapter: 90,112 of in + out a layer x 16 x 28 = 40,370,176 weights, x 4 B = 161,480,704; as much
    for gradients, twice for AdamW, half for fp16 copies.
    Activations: a pair of 448 + 2 x 192 = 832 tokens keeps 28 layer inputs of 2 x 3584 B each:
    166,985,728. Backward, one layer's: 447,897,088 (test_memory works it).
    Scoring: a chunk of the head has 67,108,864 / (4 x 152,064) = 110 tokens:
    10 x 110 x 152,064 = 167,270,400.
    vLLM: 0.48 of 14.56 GiB = 7,504,166,859; scoring a probe of 448 + 64 tokens 7 x 512 x 152,064.
    """
    plan = planned(preset(QLORA_T4), "1xT4-16GB")
    assert plan.layout.kind == "local"
    assert sizes(at(plan)) == {
        ("learner", "weights"): 5_546_851_072,
        ("learner", "adapter"): 161_480_704,
        ("learner", "gradients"): 161_480_704,
        ("learner", "AdamW"): 322_961_408,
        ("learner", "scoring"): 167_270_400,
        ("learner", "autocast copies"): 80_740_352,
        ("learner", "activations"): 166_985_728,
        ("learner", "backward"): 447_897_088,
        ("publish", "scoring"): 167_270_400,
        ("generator", "vLLM, awake"): 7_504_166_859,
        ("generator", "vLLM, asleep"): ASSUMED.graphs,
        ("generator", "scoring a probe"): 544_997_376,
        ("framework", "CUDA context"): ASSUMED.context,
    }
    resident = ASSUMED.context + 5_546_851_072 + 161_480_704
    publish = resident + 7_504_166_859 + 167_270_400 + 544_997_376
    assert at(plan).peak(host=False) == ("publish", publish)
    assert publish < 14.56 * GIB
    assert refusal(plan) is None
    lines = describe(plan).splitlines()
    assert lines[:2] == [
        "placement  local: 1 learner rank, 1 generator on 1xT4-16GB",
        "node 0     learner rank 0 on GPU 0, 0.52; generator 0 on GPU 0, 0.48",
    ]
    assert "GPU        fits: 13.7 of 14.6 GiB at most, in publish" in lines


def test_7b_qlora_on_an_a100() -> None:
    """As on a T4, in bf16 and with four times the tokens, whose activations are all kept.

    A token keeps 223,576 B in a layer (test_memory works it): x 28 x 4,096 = 25,641,484,288.
    Backward: 8 x 18944 x 4,096 = 620,756,992 and a dequantised matrix 2 x 3584 x 18944 =
    135,790,592: 756,547,584. Scoring: a layer's (8 x 18944 + 8 x 3584) x 4,096 = 738,197,504.
    vLLM: 0.4 of 79.1 GiB. Weights 0.5625 x 6,525,288,448 + 2,180,656,128 + adapter 80,740,352 =
    5,931,871,232; a step of 8,192 tokens at 156,672 B = 1,283,457,024 and 64 rows of logits
    64 x 152,064 x 14 = 136,249,344; a sequence of 1,537 tokens at 57,344 B = 88,137,728.
    """
    plan = planned(preset(QLORA_A100), "1xA100-80GB")
    budget = round(0.4 * round(79.1 * GIB))
    assert sizes(at(plan)) == {
        ("learner", "weights"): 5_546_851_072,
        ("learner", "adapter"): 161_480_704,
        ("learner", "gradients"): 161_480_704,
        ("learner", "AdamW"): 322_961_408,
        ("learner", "scoring"): 738_197_504,
        ("learner", "autocast copies"): 80_740_352,
        ("learner", "activations"): 25_641_484_288,
        ("learner", "backward"): 756_547_584,
        ("publish", "scoring"): 167_270_400,
        ("generator", "vLLM, awake"): budget,
        ("generator", "vLLM, asleep"): ASSUMED.graphs,
        ("generator", "scoring a probe"): 7 * 1088 * 152_064,
        ("framework", "CUDA context"): ASSUMED.context,
    }
    used = 5_931_871_232 + 1_283_457_024 + 136_249_344 + ASSUMED.graphs
    assert plan.found is not None
    assert plan.found.sequences == (budget - used) // 88_137_728
    assert refusal(plan) is None


def test_7b_full_under_zero_3_on_eight_a100s() -> None:
    """Eight processes, each with a vLLM of its own. P = 7,615,616,512 weights, fp32 under autocast.

    A rank holds 4P/8 = 3,807,808,256 B of weights, as much of gradients and of the copy that AdamW
    moves, 8P/8 = 7,615,616,512 of moments; for one pass 4P/8 again, of the initial policy.
    While it loads, twice the largest tensor: 8 x 152,064 x 3584 = 4,359,979,008.
    Whole: 57 norms of 3584 and 28 x 4,608 biases are tensors of under 100,000: 4 x 333,312.
    Gathered: 4 x 10^9; reduced through 4 x 5 x 10^8. Autocast's copies: linear layers and
    embedding, 2 x (6,525,288,448 + 544,997,376) = 14,140,571,648.
    Scoring: (8 x 18944 + 16 x 3584) x 4,096 tokens = 855,638,016, and as many copies.
    Activations: 28 layer inputs in fp32, 28 x 4 x 3584 x 4,096 = 1,644,167,168. Backward: a chunk
    of the head, 12 x 110 x 152,064 = 200,724,480, and its gradient twice, 2 x 2 x 544,997,376:
    2,380,713,984, more than one layer's.
    vLLM: 0.5 of 79.1 GiB; its own copy 2P = 15,231,233,024; a step of 8,192 tokens at 156,672 B and
    64 rows of logits as on one A100.
    """
    config = preset(
        LORA, model={"path": QWEN_7B, "tuning": "full"}, placement={"device": "auto", "zero": 3}
    )
    plan = planned(config, "8xA100-80GB")
    assert (plan.layout.kind, plan.layout.sharding.ranks) == ("spmd", 8)
    budget = round(0.5 * round(79.1 * GIB))
    for gpu in range(8):
        assert sizes(at(plan, gpu=gpu)) == {
            ("learner", "weights"): 3_807_808_256,
            ("learner", "small tensors, whole"): 4 * 333_312,
            ("learner", "initial policy"): 3_807_808_256,
            ("learner", "largest tensor, whole"): 4_359_979_008,
            ("learner", "gathered weights"): 4_000_000_000,
            ("learner", "gradients"): 3_807_808_256,
            ("learner", "AdamW's copy"): 3_807_808_256,
            ("learner", "AdamW"): 7_615_616_512,
            ("learner", "reduction bucket"): 2_000_000_000,
            ("learner", "scoring"): 855_638_016 + 14_140_571_648,
            ("learner", "autocast copies"): 14_140_571_648,
            ("learner", "activations"): 1_644_167_168,
            ("learner", "backward"): 2_380_713_984,
            ("generator", "vLLM, awake"): budget,
            ("generator", "vLLM, asleep"): ASSUMED.graphs,
            ("generator", "scoring a probe"): 7 * 1088 * 152_064,
            ("framework", "CUDA context"): ASSUMED.context,
        }
    used = 15_231_233_024 + 1_283_457_024 + 136_249_344 + ASSUMED.graphs
    assert plan.found is not None
    assert plan.found.sequences == (budget - used) // 88_137_728
    host = sizes(at(plan), host=True)
    # Eight sleeping copies; one checkpoint, mapped by all; a start to go back to, in eight shares;
    # by rank 0 a version in fp32, and of what it writes a file of 5 x 10^9 and the largest tensor,
    # 544,997,376 x 4 B in a checkpoint and x 2 B in a version that it publishes.
    assert host["learner", "start in fp32"] == host["publish", "stored version"] == 30_462_466_048
    assert host["publish", "copy for a checkpoint"] == 7_179_989_504
    assert host["publish", "copy to write"] == 6_089_994_752
    assert host["generator", "vLLM, asleep"] == 8 * 15_231_233_024
    assert host["learner", "checkpoint"] == 15_231_233_024
    assert refusal(plan) is None


def test_70b_lora_on_four_nodes_of_eight_h100s() -> None:
    """A learner rank on each of 32 GPUs, and generators of 8 GPUs that take turns with them.

    Llama-3.1-70B: 80 layers, hidden 8192, inner 28672, 64 heads and 8 key heads of 128, 128,256
    words. A layer: q, o 2 x 8192 x 8192, k, v 2 x 8192 x 1024, MLP 3 x 8192 x 28672 = 855,638,016;
    x 80 = 68,451,041,280; with two of 1,050,673,152 and 161 norms P = 70,553,706,496.
    Adapter: in + out is 2 x 16,384 + 2 x 9,216 + 3 x 36,864 = 161,792, x 16 x 80 = 207,093,760 = R.

    A rank has 2P/32 = 4,409,606,656 of weights; 4R/32 = 25,886,720 of the adapter, gradients and
    the copy that AdamW moves; 8R/32 = 51,773,440 of moments; autocast's copies 2R = 414,187,520.
    While it loads, twice the largest tensor: 2 x 2 x 1,050,673,152 = 4,202,692,608.
    Whole: norms 161 x 8192 in bf16, and k's and v's second matrices 160 x 16 x 1024 in fp32, under
    100,000 each: 2 x 1,318,912 + 4 x 2,621,440. Gathered 2 x 10^9, reduced through 4 x 5 x 10^8.
    A chunk of the head has 67,108,864 / (4 x 128,256) = 130 tokens. Scoring: one layer,
    (8 x 28672 + 8 x 8192) x 4,096 = 1,207,959,552.
    Activations: 80 x 2 x 8192 x 4,096 = 5,368,709,120. Backward: 8 x 28672 x 4,096 = 939,524,096
    and one layer done again: a token keeps 8 x 8192 + 8 + 2 x (6 x 8192 + 4 x 28672 + 7 x 16)
    + 2 x 4 x 8192 + 4 x 64 = 459,240 B, x 4,096 = 1,881,047,040; sum 2,820,571,136.

    vLLM, half of each card, one of 8 GPUs: weights 2P/8 = 17,638,426,624. Adapter: q 8192 + 1024,
    k and v 8192 + 128 each, o 1024 + 8192, gate and up 8192 + 3584 each, down 3584 + 8192: 70,400,
    x 16 x 80 x 2 B = 180,224,000. A step of 16,384 tokens at 2 x (4 x 8192 + (3 x 28672 +
    2 x 8192) / 8) = 91,136 B = 1,493,172,224; logits 64 x 128,256 x 14 = 114,917,376. One key head
    of 128: 2 x 80 x 128 x 2 = 40,960 B a token, x 1,537 = 62,955,520 a sequence.
    With 4 GPUs each the cache would hold 35 sequences, and 64 is what rollout.max_concurrency asks.
    """
    config = preset(LORA, model={"path": LLAMA_70B}, placement={"device": "auto", "zero": 3})
    plan = planned(config, "4x8xH100-80GB")
    layout = plan.layout
    assert (layout.kind, layout.colocated, layout.tensor_parallel) == ("ray", True, 8)
    assert layout.sharding.ranks == 32
    budget = round(0.5 * round(79.1 * GIB))
    expected = {
        ("learner", "weights"): 4_409_606_656,
        ("learner", "adapter"): 25_886_720,
        ("learner", "largest tensor, whole"): 4_202_692_608,
        ("learner", "small tensors, whole"): 2 * 1_318_912 + 4 * 2_621_440,
        ("learner", "gathered weights"): 2_000_000_000,
        ("learner", "gradients"): 25_886_720,
        ("learner", "AdamW's copy"): 25_886_720,
        ("learner", "AdamW"): 51_773_440,
        ("learner", "reduction bucket"): 2_000_000_000,
        ("learner", "autocast copies"): 414_187_520,
        ("learner", "scoring"): 1_207_959_552,
        ("learner", "activations"): 5_368_709_120,
        ("learner", "backward"): 2_820_571_136,
        ("publish", "scoring"): 10 * 130 * 128_256,
        ("generator", "vLLM, awake"): budget,
        ("generator", "vLLM, asleep"): ASSUMED.graphs,
        ("generator", "scoring a probe"): 7 * 1088 * 128_256,
        # The learner's process and the generator's.
        ("framework", "CUDA context"): 2 * ASSUMED.context,
    }
    for slot in plan.cluster.slots:
        assert sizes(at(plan, slot.node, slot.gpu or 0)) == expected
    used = 17_638_426_624 + 180_224_000 + 1_493_172_224 + 114_917_376 + ASSUMED.graphs
    assert plan.found is not None
    assert plan.found.sequences == (budget - used) // 62_955_520 >= 64
    narrower = planned(
        config.model_copy(
            update={"placement": config.placement.model_copy(update={"tensor_parallel": 4})}
        ),
        "4x8xH100-80GB",
    )
    assert narrower.found is not None
    assert narrower.found.sequences == 35
    assert refusal(plan) is None
    lines = describe(plan).splitlines()
    seats = (
        f"node {n}     learner ranks {8 * n}-{8 * n + 7} on GPU 0-7, 0.5 of each; "
        f"generator {n} on GPU 0-7, 0.5 of each"
        for n in range(4)
    )
    assert lines[:6] == [
        "placement  ray, colocated: 32 learner ranks, ZeRO-3, 4 generators of 8 GPUs each on "
        "4x8xH100-80GB",
        *seats,
        "bundles    4 placement groups, STRICT_PACK: 8 x {CPU 2, GPU 1}",
    ]
    assert "GPU        fits: 50.0 of 79.1 GiB at most, in publish" in lines
