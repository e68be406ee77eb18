"""Responses sampled from a policy, scored by a verifier, and made into preference rows."""
