"""Model definitions: one file a family, global shapes, no word about parallelism."""
