"""Mesh and sharding rules: which logical axis lives on which mesh axis."""
