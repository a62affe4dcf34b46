from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

whole = AutoModelForImageTextToText.from_pretrained("multimodal", dtype="auto")
text = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=whole.dtype)
text.get_decoder().load_state_dict(whole.get_decoder().state_dict())
text.set_output_embeddings(whole.get_output_embeddings())
text.tie_weights()
text.save_pretrained("text-only")
AutoTokenizer.from_pretrained("multimodal").save_pretrained("text-only")
