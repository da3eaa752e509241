"""The passes of fxpipe: one file, one pass; none imports another. The order they run in is ``fxpipe/pipeline.py``."""

if __name__ != "fxpipe.passes":
    raise ImportError(
        f"this folder is the package fxpipe.passes; under the name {__name__!r} every class in it would exist twice. "
        "Write `import fxpipe.passes`, and run the tests as `pytest`, not `python -m pytest`."
    )
