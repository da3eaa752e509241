"""What the kernels miss of their budgets on sm_90, in the order of the report; whoever betters one shortens this."""

FALLS_SHORT = [
    ("compress", "bfp5b32:gauss", "bfloat16", "17.66 instructions, budget 16"),
    ("compress", "bfp4b32+unsigned+e5m3+search", "bfloat16", "47 registers, budget 40"),
    ("compress", "bfp2b32:gauss+se5m2+search", "bfloat16", "48 registers, budget 40"),
    ("compress", "bfp3b32:gauss+e5m3+search", "bfloat16", "48 registers, budget 40"),
    ("compress", "bfp4b32:gauss+e5m3+search", "bfloat16", "48 registers, budget 40"),
    ("compress", "bfp4b32:gauss+unsigned+e5m3+search", "bfloat16", "48 registers, budget 40"),
]

ON_SM_100 = [
    ("compress", "bfp3b16:gauss+e5m3", "bfloat16", "48 registers, budget 40"),
    ("decompress", "bfp3b16:gauss+e5m3", "bfloat16", "48 registers, budget 40"),
]
"""Of those that ``test_compiled`` asks for there."""
