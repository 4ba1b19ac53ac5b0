// Executes templates with Go's text/template on the data that Ollama gives them: neighbouring
// messages of one role are merged (results of tools are not), .System holds all system messages,
// tools and calls are structs whose JSON has Ollama's order of keys.
//
// Reads [{"template": ..., "messages": [{"role": ..., "content": ...}], "tools": [...]}] from the
// standard input and writes the list of the texts.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type input struct {
	Template string
	Messages []struct {
		Role, Content string
		ToolCalls     []toolCall `json:"tool_calls"`
	}
	Tools []tool
}

type message struct {
	Role, Content, Thinking, ToolName, ToolCallID string
	ToolCalls                                     []toolCall
}

type toolCall struct {
	ID       string `json:"id,omitempty"`
	Function struct {
		Index     int          `json:"index"`
		Name      string       `json:"name"`
		Arguments ordered[any] `json:"arguments"`
	} `json:"function"`
}

type tool struct {
	Type     string `json:"type"`
	Items    any    `json:"items,omitempty"`
	Function struct {
		Name        string     `json:"name"`
		Description string     `json:"description,omitempty"`
		Parameters  parameters `json:"parameters"`
	} `json:"function"`
}

type parameters struct {
	Type       string            `json:"type"`
	Defs       any               `json:"$defs,omitempty"`
	Items      any               `json:"items,omitempty"`
	Required   []string          `json:"required,omitempty"`
	Properties ordered[property] `json:"properties"`
}

type property struct {
	AnyOf       []property         `json:"anyOf,omitempty"`
	Type        any                `json:"type,omitempty"`
	Items       any                `json:"items,omitempty"`
	Description string             `json:"description,omitempty"`
	Enum        []any              `json:"enum,omitempty"`
	Properties  *ordered[property] `json:"properties,omitempty"`
	Required    []string           `json:"required,omitempty"`
}

// ordered is a JSON object that keeps the order of its keys.
type ordered[V any] struct {
	keys   []string
	values []V
}

func (o *ordered[V]) UnmarshalJSON(data []byte) error {
	decoder := json.NewDecoder(bytes.NewReader(data))
	if _, err := decoder.Token(); err != nil {
		return err
	}
	for decoder.More() {
		key, err := decoder.Token()
		if err != nil {
			return err
		}
		var value V
		if err := decoder.Decode(&value); err != nil {
			return err
		}
		o.keys = append(o.keys, key.(string))
		o.values = append(o.values, value)
	}
	return nil
}

func (o ordered[V]) MarshalJSON() ([]byte, error) {
	var out bytes.Buffer
	for i, key := range o.keys {
		name, _ := json.Marshal(key)
		value, err := json.Marshal(o.values[i])
		if err != nil {
			return nil, err
		}
		out.WriteString(",")
		out.Write(append(append(name, ':'), value...))
	}
	return []byte("{" + strings.TrimPrefix(out.String(), ",") + "}"), nil
}

func asJSON(value any) string {
	text, _ := json.Marshal(value)
	return string(text)
}

func render(in input) (string, error) {
	var system []string
	var messages []*message
	for _, m := range in.Messages {
		if m.Role == "system" {
			system = append(system, m.Content)
		}
		if n := len(messages); n > 0 && messages[n-1].Role == m.Role && m.Role != "tool" {
			messages[n-1].Content += "\n\n" + m.Content
			continue
		}
		messages = append(messages, &message{Role: m.Role, Content: m.Content, ToolCalls: m.ToolCalls})
	}
	functions := template.FuncMap{"json": asJSON}
	empty := template.New("").Option("missingkey=zero").Funcs(functions)
	parsed, err := empty.Parse(in.Template)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	err = parsed.Execute(&out, map[string]any{
		"System":   strings.Join(system, "\n\n"),
		"Messages": messages,
		"Tools":    in.Tools,
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
