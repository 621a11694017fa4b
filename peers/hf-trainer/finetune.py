"""An ordinary fine-tuning script around transformers.Trainer. One line makes it a peer of a run.

python finetune.py --model MODEL --data rows.jsonl --initial-peers ADDR
"""

import argparse

import peft
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from p2pllm import GossipCallback

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="the run's base model")
parser.add_argument("--data", required=True, help="JSONL with instruction and response")
parser.add_argument("--initial-peers", required=True, nargs="+", help="multiaddrs of the swarm")
parser.add_argument("--name", default="script", help="how the others see this peer")
parser.add_argument("--output", default="runs")
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--alpha", type=int, default=16)
given = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(given.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(given.model)
lora = peft.LoraConfig(
    r=given.rank,
    lora_alpha=given.alpha,
    target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM",
)
model = peft.get_peft_model(model, lora)

rows = load_dataset("json", data_files=given.data, split="train")
rows = rows.map(
    lambda row: tokenizer(
        f"{row['instruction']}\n{row['response']}", truncation=True, max_length=128
    ),
    remove_columns=rows.column_names,
)

Trainer(
    model=model,
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    args=TrainingArguments(
        output_dir=f"{given.output}/{given.name}-trainer",
        per_device_train_batch_size=4,
        num_train_epochs=1000,  # the run says when it is over
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    ),
    callbacks=[GossipCallback(*given.initial_peers, name=given.name, output=given.output)],
).train()
