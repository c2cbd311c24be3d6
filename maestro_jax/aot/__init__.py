"""Ahead of time: what a run's programs need of a device, before there is one."""
