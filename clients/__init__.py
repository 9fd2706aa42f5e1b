"""The client: distils the student on private text and scores it there; only sums leave."""
