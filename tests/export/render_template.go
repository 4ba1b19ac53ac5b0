// Executes templates with Go's text/template on the data that Ollama gives them: neighbouring
// messages of one role are merged, and .System holds all system messages.
//
// Reads [{"template": ..., "messages": [{"role": ..., "content": ...}]}] from the standard input
// and writes the list of the texts.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type input struct {
	Template string
	Messages []struct{ Role, Content string }
}

type message struct {
	Role, Content, Thinking, ToolName, ToolCallID string
	ToolCalls                                     []any
}

func render(in input) (string, error) {
	var system []string
	var messages []*message
	for _, m := range in.Messages {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(messages); n > 0 && messages[n-1].Role == m.Role {
			messages[n-1].Content += "\n\n" + m.Content
			continue
		}
		messages = append(messages, &message{Role: m.Role, Content: m.Content})
	}
	parsed, err := template.New("").Option("missingkey=zero").Parse(in.Template)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	err = parsed.Execute(&out, map[string]any{
		"System":   strings.Join(system, "\n\n"),
		"Messages": messages,
		"Tools":    nil,
		"Response": "",
		"Think":    false,
	})
	return out.String(), err
}

func main() {
	var inputs []input
	if err := json.NewDecoder(os.Stdin).Decode(&inputs); err != nil {
		panic(err)
	}
	outputs := []string{}
	for _, in := range inputs {
		text, err := render(in)
		if err != nil {
			text = "error: " + err.Error()
		}
		outputs = append(outputs, text)
	}
	if err := json.NewEncoder(os.Stdout).Encode(outputs); err != nil {
		panic(err)
	}
}
