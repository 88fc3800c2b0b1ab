"""Before the job: the decision that becomes part of the composed config. Nothing in this room imports torch."""
