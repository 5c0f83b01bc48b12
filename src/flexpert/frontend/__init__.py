"""From a request to text, without HTTP: sequences, detokenization, stop texts, logprobs."""
