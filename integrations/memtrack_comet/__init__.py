"""memtrack in Comet: ``sys.`` metrics over time, figures under Other, and the archive that a killed experiment lacks.

What memtrack measures    | its name in Comet               | where it is
--------------------------|---------------------------------|-----------------------------------------------
memory/process/rss_mib    | sys.memory.process.rss_mib      | beside Comet's own sys. metrics, without a step
memory/<scope>/<quantity> | sys.memory.<scope>.<quantity>   | the same
final figures             | memtrack.peak_rss_mib, …        | Other, and columns to sort experiments by
the verdict on a death    | memtrack.verdict, …, and a tag  | Other
"""

from memtrack_comet._autolog import autolog
from memtrack_comet._sink import CometSink

__all__ = ["CometSink", "autolog"]
