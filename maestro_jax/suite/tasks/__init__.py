"""The offline suite: multimodal tasks in five domains, made from data that ships inside packages.

One module a domain (`visual_qa`, `counting`, `geometry`, `charts`, `reading`), each with
`tasks(split, count, seed)`; `build` writes them to disk as one TFDS data set.
"""
