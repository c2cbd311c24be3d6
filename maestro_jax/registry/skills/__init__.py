"""How the stages of a skill run."""
