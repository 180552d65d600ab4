"""Run first by each Python below ``memtrack run``: turns autolog on, and leaves everything else as it was.

Any interpreter may come here, Python 2 and such as have no memtrack among them, so it is written for all of them. It
defines nothing but what it must: who looks finds the ``sitecustomize`` that this one hides, if there is one.
"""

import os
import sys

sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(__file__)]
# held on to: Python 2 empties a module that nobody holds
_ours = sys.modules.pop(__name__, None)
try:
    import sitecustomize  # noqa: F401
except ImportError:
    # there is none, or it fails as it would without us
    if getattr(sys.exc_info()[1], "name", __name__) != __name__:
        raise
finally:
    sys.modules.setdefault(__name__, _ours)  # type: ignore[arg-type]
    if "MEMTRACK_RUN" in os.environ:
        try:
            from memtrack.cli import unasked

            unasked.wait()
        except Exception:  # no memtrack here, or another one
            pass
