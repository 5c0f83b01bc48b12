"""The same model in llama.cpp's server, under the same load in turn."""
