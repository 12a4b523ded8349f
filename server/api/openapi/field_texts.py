"""What fields of bodies mean, for those that say nothing of it where they are declared; the same in every body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

FIELD_TEXTS: Final[Mapping[str, str]] = {
    "add_generation_prompt": "End the prompt with the beginning of an answer; the default unless "
    "`continue_final_message`.",
    "add_special_tokens": "Begin as the tokenizer does, with its beginning-of-text token if it has one. A chat "
    "template writes it by itself.",
    "chat_template": "Jinja, instead of the model's own; a 400 unless the server allows it "
    "(`--allow-request-chat-template`).",
    "chat_template_kwargs": "Variables for the chat template, besides its own.",
    "continue_final_message": "Leave the last message open, for the model to go on with.",
    "echo": "Not for chats.",
    "frequency_penalty": "Subtracted from a token's logit for each time it was generated.",
    "guided_choice": "The output is one of these.",
    "guided_json": "A JSON schema that the output matches, as an object or as its JSON text.",
    "guided_regex": "A regular expression that the whole output matches, in the syntax of Rust's regex crate.",
    "ignore_eos": "Go on where the model would end.",
    "include_stop_str_in_output": "Keep the stop string that ended the text.",
    "json_schema": "SGLang's name for `guided_json`.",
    "load_inplace": "Replace an adapter of that name.",
    "logit_bias": "Added to the logits of tokens, by token id.",
    "logprobs": "With each token its log-probability; for completions also of so many of the likeliest in its place.",
    "lora_name": "The adapter's name.",
    "lora_path": "A directory inside the allowed roots, or a hub id.",
    "max_completion_tokens": "OpenAI's newer name for `max_tokens`.",
    "max_tokens": "Tokens to generate at most; without it, as many as fit.",
    "messages": "The conversation. Whether all roles and orders are taken is up to the chat template.",
    "min_p": "Tokens less likely than this, as a share of the likeliest one's probability, are not drawn.",
    "min_tokens": "Nothing ends the text before so many tokens.",
    "model": "The base, an adapter, or `base:adapter`; the base if left out.",
    "n": "Choices for each prompt.",
    "pinned": "Keep it on the device.",
    "presence_penalty": "Subtracted once from the logit of a token that was generated.",
    "priority": "Lower is earlier, among the requests of one tenant.",
    "prompt": "The text; for completions also token ids, or several of either.",
    "repetition_penalty": "Divides the logits of tokens of the prompt and of the output; 1 changes nothing.",
    "replace": "Whether a name that is taken is replaced, or refused.",
    "response_format": "What the output must be: any text, any JSON object, or JSON of a schema.",
    "return_token_strs": "Answer with each token's text as well.",
    "seed": "The same request with the same seed draws the same tokens. Each choice has its own.",
    "skip_special_tokens": "Leave special tokens out of the text.",
    "spaces_between_special_tokens": "false is a 400 where the tokenizer puts spaces there.",
    "stop": "Texts that end the output, and are left out of it.",
    "stop_token_ids": "Tokens that end the output.",
    "stream": "Send tokens as they come, as server-sent events.",
    "stream_options": "With `stream` only.",
    "structured_outputs": "vLLM's form of the `guided_` fields.",
    "temperature": "0 takes the likeliest token.",
    "tokens": "Token ids.",
    "tools": "Functions that the model may call; a 400 if its chat template knows no tools.",
    "top_k": "Draw from so many of the likeliest; 0 or -1: from all.",
    "top_logprobs": "With `logprobs`: so many of the likeliest tokens in each place.",
    "top_p": "Draw from the likeliest tokens that have this much of the probability together.",
    "truncate_prompt_tokens": "Keep so many tokens of the prompt's end; -1: as many as fit.",
}
