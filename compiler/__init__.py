"""The compiler: trace, partition, lower, weights."""

import sys

from shardwright.errors import UsageError

if "tvm" in sys.modules and "tvm.relax" not in sys.modules:
    # A session loaded TVM's runtime alone, and TVM cannot add its compiler later.
    raise UsageError(
        "this process runs models and cannot build any more; import shardwright.compiler before "
        "the first Session, or build in another process with `shardwright build`"
    )
