"""Calls of tools, and reasoning, in what a model writes: one grammar for each family of models.

tool_events     what a grammar finds, and how it is handed on              (pure)
call_reader     text that comes in pieces, read as if it were whole         (pure)
call_arguments  arguments of a call: JSON as it is, or made of XML's values (pure)
json_calls      families that write calls as JSON                           (pure)
xml_calls       families that write them as tags                            (pure)
harmony         GPT-OSS                                                     (pure)
answer_parser   which grammar a model needs; answers with reasoning         (pure)
tool_choice     what a request says of tools; a schema that enforces it     (pure)
"""
