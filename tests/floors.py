"""Which floor each file stands on: it imports only files on lower floors.

A new file is entered here and in ARCHITECTURE.md; ``test_layers.py`` holds the sources to it.
"""

FLOORS = {
    0: ["fxpipe/errors.py", "triton_kernels/format.py"],
    1: [
        "fxpipe/units.py",
        "fxpipe/ir/__init__.py",
        "fxpipe/ir/action.py",
        "fxpipe/ir/expression.py",
        "fxpipe/ir/partition.py",
        "fxpipe/ir/compression.py",
        "fxpipe/ir/stage_graphs.py",
        "triton_kernels/__init__.py",
        "triton_kernels/reference.py",
        "triton_kernels/tiles.py",
    ],
    2: [
        "fxpipe/ir/schedule.py",
        "fxpipe/ir/cost.py",
        "fxpipe/chain.py",
        "triton_kernels/cpu.py",
        "triton_kernels/kernels.py",
    ],
    3: [
        "fxpipe/ir/program.py",
        "fxpipe/devices.py",
        "fxpipe/probe.py",
        "fxpipe/value_facts.py",
        "fxpipe/verify_schedule.py",
        "fxpipe/simulate.py",
        "fxpipe/cut_search.py",
        "triton_kernels/launch.py",
    ],
    4: [
        "fxpipe/verify.py",
        "fxpipe/printing.py",
        "fxpipe/pass_base.py",
        "fxpipe/storages.py",
        "fxpipe/save_points.py",
        "triton_kernels/ops.py",
    ],
    5: [
        "fxpipe/pass_manager.py",
        "fxpipe/cost_model.py",
        "fxpipe/in_place.py",
        "fxpipe/recompute.py",
        "fxpipe/microbatch.py",
        "passes/schedule_orders.py",
    ],
    6: ["fxpipe/trace.py", "fxpipe/profile.py", "fxpipe/cut_rules.py"],
    7: [
        "passes/__init__.py",
        "passes/canonicalize.py",
        "passes/keep_loss.py",
        "passes/annotate.py",
        "passes/use_costs.py",
        "passes/partition.py",
        "passes/schedule.py",
        "passes/lower.py",
        "passes/compress.py",
    ],
    8: ["fxpipe/pipeline.py"],
    10: ["fxpipe/runtime/__init__.py", "fxpipe/runtime/stage_runner.py"],
    11: ["fxpipe/runtime/local.py", "fxpipe/runtime/torch_pp.py", "fxpipe/demos/seed.py", "fxpipe/demos/text.py"],
    12: ["fxpipe/runtime/pipe.py", "fxpipe/demos/plain.py", "fxpipe/demos/hugging_face.py"],
    13: ["fxpipe/demos/__init__.py"],
    14: ["fxpipe/model_source.py"],
    15: ["fxpipe/commands.py"],
    16: ["fxpipe/cli.py"],
    17: ["fxpipe/__main__.py"],
    20: ["fxpipe/__init__.py"],
}
NO_TORCH = [
    "fxpipe/__init__.py",
    "fxpipe/__main__.py",
    "fxpipe/cli.py",
    "fxpipe/errors.py",
    "fxpipe/units.py",
    "fxpipe/ir/action.py",
    "fxpipe/ir/schedule.py",
    "fxpipe/ir/partition.py",
    "fxpipe/ir/compression.py",
    "fxpipe/verify_schedule.py",
    "fxpipe/simulate.py",
    "fxpipe/chain.py",
    "fxpipe/cut_search.py",
    "passes/schedule_orders.py",
    "triton_kernels/__init__.py",
    "triton_kernels/format.py",
]
NOT_PASSES = ["passes/__init__.py", "passes/schedule_orders.py"]
NAMES_THE_PASSES = ["fxpipe/pipeline.py"]

FLOOR_OF = {file: floor for floor, files in FLOORS.items() for file in files}
