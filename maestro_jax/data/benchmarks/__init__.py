"""Published benchmarks: files as their authors distribute them in, tasks of each split out. `catalogue` lists them."""
