"""What produces samples and scores: generators, prompt pools, judges."""
