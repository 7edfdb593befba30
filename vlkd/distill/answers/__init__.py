"""A teacher's distributions over answer tokens on disk: the largest K log probabilities of each, and a manifest."""
