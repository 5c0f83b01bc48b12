"""Loading any MoE model of transformers through two registrations; no modelling code of ours."""
