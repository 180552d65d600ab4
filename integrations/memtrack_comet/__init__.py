"""memtrack in Comet: ``sys.`` metrics over time, figures under Other, and the archive that a killed experiment lacks.

What memtrack measures    | its name in Comet               | where it is
--------------------------|---------------------------------|-----------------------------------------------
memory/process/rss_mib    | sys.memory.process.rss_mib      | beside Comet's own sys. metrics, without a step
memory/<scope>/<quantity> | sys.memory.<scope>.<quantity>   | the same
final figures             | memtrack.peak_rss_mib, …        | Other, and columns to sort experiments by
the verdict on a death    | memtrack.verdict, …, and a tag  | Other
artifacts, checkpoints    | memtrack/<name>.mtz, …          | Assets
"""

from memtrack_comet._autolog import autolog
from memtrack_comet._sink import CometSink
from memtrack_comet._store import active_store, open_store

__all__ = ["CometSink", "active_store", "autolog", "open_store"]
