"""How an expert is asked: behind servers (HTTP) or as a class in this process or others."""
