"""Entry of the agent: ``python -I -S .../memtrack/agent/__main__.py RECORDING [relieve]``; ``launch.spawn`` starts it.

``-I -S`` keeps site-packages, user configuration and whatever they import out of the process: it starts in some 15 ms
and stays small. That leaves memtrack's own folder to be added here, at the end, where it cannot shadow anything.
"""

import os
import sys


def _detach() -> None:
    """Become nobody's child: a program that waits for all its children must not wait for the agent."""
    if not hasattr(os, "fork"):
        return
    if os.fork():
        os._exit(0)
    os.setsid()
    # descriptors that the training process left inheritable (sockets, devices) are not ours to keep open
    os.closerange(4, 1 << 20)


if __name__ == "__main__":
    _detach()
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from memtrack.agent.loop import main

    sys.exit(main(sys.argv[1], relieving=sys.argv[2:] == ["relieve"]))
