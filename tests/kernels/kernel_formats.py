"""Formats for the kernels to be tried on: every option in every role at least once."""

FAMILY = [
    *(f"bfp{width}b{block}+{scale}" for width, block, scale in (
        (4, 16, "e6m2"), (3, 8, "e5m3"), (8, 128, "e5m3"), (2, 32, "e6m2"), (4, 64, "e5"), (6, 8, "e4"), (2, 16, "e4"),
    )),
    *(f"bfp{width}b{block}+unsigned+{scale}" for width, block, scale in (
        (5, 16, "e6m2"), (8, 32, "e5m3"), (2, 64, "e6m2"), (3, 128, "e5"), (7, 8, "e4"),
    )),
    "bfp2b16+twos", "bfp4b32+twos", "bfp8b8+twos", "bfp7b16+twos+e4", "bfp5b64+twos+e5m3",
    "bfp2b32+trunc", "bfp4b16+trunc", "bfp8b64+unsigned+trunc", "bfp3b16+twos+e5m3+trunc", "bfp6b128+unsigned+e5+trunc",
    "bfp2b16+hash", "bfp4b32+hash", "bfp8b8+hash", "bfp4b16+unsigned+e6m2+hash", "bfp5b128+twos+hash", "bfp3b64+e4+hash",
    "bfp2b32+sr", "bfp4b16+sr", "bfp8b64+sr", "bfp8b16+unsigned+e6m2+sr", "bfp3b8+twos+e4+sr", "bfp5b32+e5m3+sr",
    "bfp2b64:gauss", "bfp3b16:gauss+e5m3", "bfp4b16:gauss", "bfp4b128:gauss+e6m2", "bfp5b32:gauss+e6m2",
    "bfp2b8:gauss+unsigned+e4", "bfp3b16:gauss+unsigned", "bfp4b32:gauss+unsigned+e5m3",
    "bfp2b32:gauss+se5m2", "bfp3b16:gauss+se5m2",
    "bfp3b16:lossy-lite", "bfp3b64:lossy-normal+e5m3", "bfp2b16:lossy-aggressive", "bfp2b16:lossy-lite+unsigned",
    *(f"bfp4b{block}+o1" for block in (8, 32, 128)), "bfp3b16+e5m3+o1", "bfp8b32+o1", "bfp5b64+unsigned+e6m2+o1",
    "bfp4b16+o1t3", "bfp6b32+twos+e4+o1", "bfp4b32+sr+o1", "bfp4b16:gauss+e5m3+o1t1", "bfp2b16:gauss+o1",
    "bfp4b16+o3", "bfp6b32+e5m3+o2t2", "bfp3b8:gauss+se5m2+o2", "bfp4b64+unsigned+o1t2", "bfp4b16:learned+e5m3+o2",
    "bfp2b128+twos+e4+sr+o2t1", "bfp8b8+unsigned+o3", "bfp3b32:learned+se5m2+o1t1", "bfp4b128:gauss+e5m3+search+o2",
    "bfp3b64+e5m3+o4t2", "bfp2b16:gauss+se5m2+search+o1t1", "bfp4b32+unsigned+search+o2t2",
    "bfp3b16:gauss+se5m2+o12",
    "bfp4b32+dither", "bfp2b16+twos+e4+dither-density", "bfp8b64+unsigned+e5m3+dither", "bfp4b8+o1+dither-density",
    "bfp5b16:gauss+dither", "bfp3b32:gauss+unsigned+e6m2+dither-density", "bfp3b64:gauss+se5m2+dither",
    "bfp4b16:learned+e5m3+dither", "bfp2b16:learned+unsigned+dither-density", "bfp3b32:learned+se5m2+dither",
    "bfp4b16:learned+e5m3", "bfp2b32:learned", "bfp3b8:learned+se5m2", "bfp4b64:learned+unsigned+o1", "bfp5b128:learned+e4",
    "bfp4b32+e5m3+search", "bfp2b16+search", "bfp5b8+twos+e4+search", "bfp3b128+unsigned+e5m3+search",
    "bfp7b16+unsigned+search", "bfp4b32:gauss+e6m2+search", "bfp5b64:gauss+e6m2+search",
    "bfp3b8:gauss+unsigned+e5m3+search", "bfp3b32:gauss+search", "bfp2b128:gauss+se5m2+search",
    "bfp3b16:learned+e5m3+search", "bfp4b32:learned+unsigned+search",
    "bfp3b32:gauss+e5m3+absmax", "bfp4b16+e6m2+absmax", "bfp3b16:gauss+se5m2+absmax", "bfp8b32+unsigned+e5m3+absmax",
    "bfp4b32:gauss+unsigned+e5m3+absmax+o1", "bfp2b16:40ff+e6m2+absmax",
    "bfp3b16:00204060+e5m3", "bfp2b16:c0001050+se5m2", "bfp4b8:0b192744597bacff+e5",
]  # fmt: skip
"""Those with options."""
