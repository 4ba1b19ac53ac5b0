"""The fused distillation loss in a plain Hugging Face training loop.

    python examples/fused_loss.py

Two random LLaMA models stand for teacher and student. The student runs without its LM head:
`fused_loss` computes the head, the loss and the gradients block by block, so the logits of all
positions are never in memory at once.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xinslm.losses import DenseTargets, LossConfig, fused_loss, next_tokens


def llama(hidden_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def main(steps: int = 30) -> list[float]:
    teacher, student = llama(64, seed=0).eval(), llama(32, seed=1).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    input_ids = torch.randint(512, (4, 32))
    losses = []
    for _ in range(steps):
        with torch.no_grad():
            logits = teacher(input_ids).logits.flatten(0, 1)  # (batch * seq, vocab)
        hidden = student.model(input_ids).last_hidden_state  # (batch, seq, hidden)
        hidden, labels, places = next_tokens(hidden, input_ids)
        logits = logits[places]
        targets = DenseTargets(lambda rows, logits=logits: logits[rows])
        config = LossConfig(alpha=0.1, beta=0.9)
        loss, _ = fused_loss(hidden, student.lm_head.weight, labels, targets, config)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
