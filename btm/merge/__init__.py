"""Average models of one architecture into one Hugging Face directory, tensor by tensor, without loading any of them.

``MERGE_METHODS`` (``methods.py``) is the one table of methods, each a function from a request to one weight per model.
The engine (``average.py``) streams the safetensors files once, in pieces of a fixed size: memory depends neither on the
size of the models nor on their number. Nothing here imports torch, except the judge of a greedy soup when it is used.
"""
