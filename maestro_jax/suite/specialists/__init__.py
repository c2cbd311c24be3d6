"""In-process experts and services of the offline suite: small frozen models seeing pixels and a prompt, never gold."""
