"""Which group of `--help` an option belongs to. One name means the same in every command, so the
group follows from the name; a test finds options that are in no group, and names of no option.

Positional arguments are input in any case, and a configuration inside another (`--loss.alpha`) is a
group of its own.
"""

GROUPS = {
    "Input": """
        data_path tokenizer_path teacher teacher_tokenizer_path student cache more_caches adapter
        init_from hidden_states use_mock self_generate prompts prompt prompt_file chat system split
        max_documents validation_path validation_fraction document_end max_tokens keep_duplicates
        split_documents text_field dataset_name dataset_split train_on_prompts prefix_of
        domain_weights mix_data mix_cache compare tokens built_in num_prompts
        tasks data against apply_chat_template max_minutes speed allow_code_execution judge
        judge_model
    """,
    "Output": """
        output_dir output_path force run name show num_pieces keep_cache outtype embedding_type
        format x log_x repair ollama lmstudio lmstudio_dir public message dry_run
    """,
    "Model": """
        preset vocab_size hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size
        tie_word_embeddings sliding_window max_seq_length min_frequency max_token_length
        special_tokens layers compensate bits method target_size lora_r lora_alpha lora_dropout
        target_modules group_size
    """,
    "Training": """
        num_epochs max_steps batch_size micro_batch_size learning_rate warmup_ratio decay_ratio
        weight_decay optimizer max_grad_norm max_eval_samples eval_steps save_steps logging_steps
        teacher_steps student_steps megabytes rounds completions mix_share off_policy_share contrast
        contrast_start contrast_end memory hourly_price teacher_parameters
        num_calibration_samples num_search_samples scale_steps quantization_aware
    """,
    "Sampling": """
        max_new_tokens samples temperature top_k top_p min_p repetition_penalty stop
        tail_sample_mass cache_temperature token_temperature weights cache_weights prompt_tokens
        generation_batch_size support_top_k
    """,
    "Advanced": """
        device engine threads kv_cache draft dtype teacher_dtype compute_dtype param_dtype
        activations compile gradient_checkpointing optimizer_in_backward adam_beta1 adam_beta2
        batch_tokens shard_positions alignment hidden_state_depths hidden_state_width ridge
        documents positions allow_special revision predictions trust_remote_code compute_units seed
    """,
}
"""Names of the fields by group, in the order of the groups."""

GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}
