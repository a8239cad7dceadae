"""What losing a unit costs: one idea a file, one protocol (`base.Criterion`), one registry (`registry.CRITERIA`)."""
