"""Studies: variants of a config times seeds, run as independent jobs that can be resumed, and what they say."""
