"""Code sandboxes: untrusted programs run here, behind one interface."""
