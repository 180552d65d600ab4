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


def _outlive() -> None:
    """Be no victim of the kernel's, where it lets us say so (CAP_SYS_RESOURCE).

    Some milliseconds after it has killed the training process, whose memory is still on its way back, a single page
    for the agent may be one too many in their cgroup: the next to be killed is the only one left, which is the agent.
    """
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("-1000")
    except OSError:
        pass


if __name__ == "__main__":
    _detach()
    _outlive()
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from memtrack.agent.loop import main

    sys.exit(main(sys.argv[1], relieving=sys.argv[2:] == ["relieve"]))
